"""The hash of a user's function changes with what the function depends on, and with nothing else."""

import sys
from pathlib import Path

import pytest

from alignkit.config.code_hash import code_hash

REWARD = '''
"""Rewards of mine."""
import math
from words import GOOD
from words import BAD
import tools

SCALE = 2.0
OTHER = 3.0

class Table:
    best = 1

def _value(text):
    return SCALE * len(text) * Table.best

def score(prompts, completions, **columns):
    # the longer the better
    return [_value(text) + GOOD + tools.one() for text in completions]

def other(prompts, completions, **columns):
    return [OTHER + BAD for _ in completions]
'''


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text(REWARD)
    Path("words.py").write_text("GOOD = 1\nBAD = 2\n")
    Path("tools.py").write_text("import deep\ndef one():\n    return deep.ONE\n")
    Path("deep.py").write_text("ONE = 1\n")
    return tmp_path


@pytest.mark.parametrize("spec", ["rewards.py:score", "rewards:score"])
@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("rewards.py", "len(text)", "len(text) + 1"),
        ("rewards.py", "SCALE = 2.0", "SCALE = 4.0"),
        ("rewards.py", "best = 1", "best = 2"),
        ("rewards.py", "OTHER = 3.0", "OTHER = 3.0\nTable.best = 2"),
        ("rewards.py", "OTHER = 3.0", "OTHER = 3.0\nmath.tau = 2"),
        ("rewards.py", "OTHER = 3.0", "OTHER = 3.0\nif OTHER:\n    SCALE = 1"),
        ("words.py", "GOOD = 1", "GOOD = 5"),
        ("tools.py", "deep.ONE", "-deep.ONE"),
        ("deep.py", "ONE = 1", "ONE = 2"),
    ],
)
def test_it_changes_with_what_the_function_depends_on(files, spec, file, old, new):
    before = code_hash(spec)
    Path(file).write_text(Path(file).read_text().replace(old, new))
    assert code_hash(spec) != before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("rewards.py", "# the longer the better", "# as long as it can be"),
        ("rewards.py", "OTHER + BAD", "OTHER - BAD"),
        ("rewards.py", "OTHER = 3.0", "OTHER   =   4.0"),
        ("words.py", "BAD = 2", "BAD = 7"),
        ("rewards.py", "\nSCALE", "\n\n\nSCALE"),
    ],
)
def test_it_stays_with_everything_else(files, file, old, new):
    before = code_hash("rewards.py:score")
    Path(file).write_text(Path(file).read_text().replace(old, new))
    assert code_hash("rewards.py:score") == before


def test_a_package_and_relative_imports(files):
    package = files / "mine"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("from .inner.reward import score\n")
    (package / "inner" / "__init__.py").write_text("")
    (package / "inner" / "reward.py").write_text(
        "from ..parts import *\nfrom . import more\ndef score(p, c):\n    return [ONE for _ in c]\n"
    )
    (package / "parts.py").write_text("ONE = 1\n")
    (package / "inner" / "more.py").write_text("X = 1\n")
    first = code_hash("mine:score")
    (package / "parts.py").write_text("ONE = 2\n")
    second = code_hash("mine:score")
    assert second != first
    assert code_hash("mine.inner.reward:score") == code_hash("mine.inner.reward:score")
    (package / "inner" / "reward.py").write_text("def score(p, c):\n    return [3 for _ in c]\n")
    assert code_hash("mine:score") != second


@pytest.mark.parametrize("text", ["def score(:", "X = '\udcff'\n", "\0"])
def test_a_file_that_cannot_be_parsed_counts_byte_by_byte(tmp_path, text):
    file = tmp_path / "broken.py"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    before = code_hash(f"{file}:score")
    file.write_bytes(file.read_bytes() + b"#")
    assert code_hash(f"{file}:score") != before


def test_nothing_is_run_and_names_without_a_file_have_a_hash(files):
    Path("loud.py").write_text(
        "raise SystemExit(1)\ndef score(p, c):\n    return globals()['X']\nX = 1\n"
    )
    before = code_hash("loud:score")
    Path("loud.py").write_text(Path("loud.py").read_text().replace("X = 1", "X = 2"))
    assert code_hash("loud:score") != before
    assert "loud" not in sys.modules
    assert code_hash("nowhere.py:score") != code_hash("nowhere.py:other")
