"""The ledger says what is there: its page is up to date, and whatever an entry names exists."""

import ast
import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest
import typer

from alignkit.cli.main import app
from alignkit.config.decode import DecodeFile
from alignkit.config.recipe import Recipe
from alignkit.config.section import Section
from alignkit.objectives import OBJECTIVES, locate

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def ledger():
    """The script that makes the page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs"))
        yield import_module("make_ledger")


def sections(annotation):
    """The sections of a recipe that an annotation holds, at any depth: `list[RewardConfig] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from sections(part)


def is_field(path):
    """Whether `section.field` is one of a recipe or of a file with a decoder."""
    here = [Recipe, DecodeFile]
    for name in path.split("."):
        fields = [section.model_fields[name] for section in here if name in section.model_fields]
        if not fields:
            return False
        here = [section for field in fields for section in sections(field.annotation)]
    return True


def is_command(line):
    """Whether `alignkit COMMAND --option` names a command and options that it has."""
    program, name, *words = shlex.split(line)
    command = typer.main.get_command(app).commands.get(name)
    if program != "alignkit" or command is None:
        return False
    known = {option for parameter in command.params for option in parameter.opts}
    return {word for word in words if word.startswith("--")} <= known


def is_objective(name):
    """Whether `NAME` or `NAME.FIELD` is in the registry."""
    name, _, field = name.partition(".")
    if name not in OBJECTIVES:
        return False
    module, cls, _ = locate(name)
    return not field or field in getattr(import_module(module), cls).model_fields


def is_function(path):
    module, _, name = path.rpartition(".")
    return callable(getattr(import_module(module), name, None))


def is_test(path):
    """Whether FILE::FUNCTION is a test."""
    file, _, function = path.partition("::")
    if not (ROOT / file).is_file():
        return False
    tree = ast.parse((ROOT / file).read_text())
    return function.startswith("test_") and function in {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    }


CHECKS = {
    "objective": is_objective,
    "command": is_command,
    "field": is_field,
    "function": is_function,
    "example": lambda path: (ROOT / path).is_file(),
    "test": is_test,
}


def test_the_page_of_the_ledger_is_what_its_script_makes(ledger):
    assert (ROOT / "docs" / "ledger.md").read_text() == ledger.make_page()


def test_every_entry_runs_and_has_a_test_or_says_why_not(ledger):
    entries = ledger.entries()
    names = [entry["name"] for entry in entries]
    assert len(set(names)) == len(names)
    for entry in entries:
        assert all(entry.get(key) for key in ("name", "about", "family")), entry
        uses = {use for use in ledger.USES if use in entry}
        others = set(entry) - {"name", "about", "family"}
        built = others == uses | {"test"} and bool(uses)
        assert built or (others == {"reason"} and len(entry["reason"].split()) > 1), entry


def test_what_an_entry_names_exists(ledger):
    for entry in ledger.entries():
        for key, exists in CHECKS.items():
            assert key not in entry or exists(entry[key]), f"{entry['name']}: {entry[key]}"


def test_names_that_do_not_exist_are_noticed():
    wrong = {
        "objective": ["dpoo", "dpo.betta"],
        "command": ["alignkit paris", "alignkit pairs --way x", "trainkit pairs"],
        "field": ["train.stepz", "training.steps", "train.steps.more"],
        "function": ["alignkit.decoding.worst_of_n"],
        "example": ["examples/none.py"],
        "test": ["tests/test_ledger.py::is_test", "tests/none.py::test_it", "tests/test_ledger.py"],
    }
    for key, names in wrong.items():
        for name in names:
            assert not CHECKS[key](name), name


def test_the_page_counts_every_entry(ledger):
    head = ledger.make_page().partition("##")[0]
    built, total = map(int, re.search(r"(\d+) of (\d+) are built", head).groups())
    kinds = [ledger.how(entry) for entry in ledger.entries()]
    assert total == len(kinds)
    assert built == sum(kind in ("objective", "command", "function") for kind in kinds)
