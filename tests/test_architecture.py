"""docs/architecture.md speaks of files and functions that exist, and lists the files of one DPO
step.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

from alignkit import load_recipe, run_recipe
from alignkit.training import loop

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "alignkit"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
CODE = re.findall(r"`([^`\n]+)`", PAGE)


def names_of(file):
    """Functions, classes and assigned names at the top of a file, and `Class.member`."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            members = (m for m in node.body if isinstance(m, ast.FunctionDef))
            names |= {f"{node.name}.{member.name}" for member in members}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_every_function_that_it_names_exists():
    named = [code.split("::") for code in CODE if "::" in code and code != "file.py::name"]
    assert len(named) > 40
    for file, name in named:
        assert (PACKAGE / file).is_file(), file
        # A method may be inherited, so its class is looked up for it.
        assert name in names_of(PACKAGE / file), f"{file} has no {name}"


def test_every_file_and_folder_that_it_names_exists():
    paths = [code for code in CODE if re.fullmatch(r"[a-z0-9_/]+(\.py|/)", code)]
    assert len(paths) > 50
    families = {f"{folder.name}/" for folder in (PACKAGE / "objectives").iterdir()}
    for path in paths:
        assert (PACKAGE / path).exists() or (ROOT / path).exists() or path in families, path


def test_the_tree_has_every_folder_and_every_root_module():
    listed = set(re.findall(r"^\| `([\w/.]+)` \|", PAGE, re.MULTILINE))
    folders = {f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    modules = {path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")}
    assert listed == folders | modules


def test_a_dpo_step_runs_through_the_files_that_it_lists(tmp_path, monkeypatch):
    """Every function of alignkit that is called during one update is watched."""
    (section,) = re.findall(r"through these files and no others.*?\n\n(.*?)\n\n##", PAGE, re.DOTALL)
    listed = re.findall(r"^- `([\w/.]+)`", section, re.MULTILINE)
    used = {"training/loop.py"}  # the loop calls the update
    update = loop.UPDATES["gradient"]

    def watch(frame, event, _):
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(PACKAGE):
            used.add(file.relative_to(PACKAGE).as_posix())

    def watched(*arguments):
        sys.setprofile(watch)
        try:
            return update(*arguments)
        finally:
            sys.setprofile(None)

    monkeypatch.setitem(loop.UPDATES, "gradient", watched)
    overrides = ["data.train=task:reviews_small", "train.steps=2", "train.batch_size=4"]
    run_recipe(load_recipe("dpo", [*overrides, f"output_dir={tmp_path}/run"]))
    assert sorted(listed) == sorted(used)
    assert len(listed) <= 15


@pytest.mark.parametrize("name", ["training/nowhere.py::train", "training/loop.py::nothing"])
def test_a_name_that_does_not_exist_is_found(name):
    file, function = name.split("::")
    path = PACKAGE / file
    assert not path.is_file() or function not in names_of(path)
