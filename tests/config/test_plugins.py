import sys

import pytest

from alignkit.config.plugins import load_object
from alignkit.errors import ConfigError
from alignkit.training.messages import shown_messages


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text("class Mine:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_and_a_module_of_the_working_directory_are_the_same_object(folder):
    path = list(sys.path)
    assert load_object("my_losses.py:Mine", what="objective.import") is load_object(
        "my_losses:Mine", what="objective.import"
    )
    assert sys.path == path  # nothing else in the folder becomes importable


def test_an_installed_module_is_found():
    assert load_object("json:dumps", what="rewards.0.function")({}) == "{}"


def test_it_is_announced_before_it_runs(folder, capsys):
    (folder / "loud.py").write_text("import sys\nprint('running', file=sys.stderr)\nx = 1\n")
    with shown_messages():
        load_object("loud.py:x", what="objective.import")
    announced, running = capsys.readouterr().err.splitlines()
    assert announced == "alignkit: objective.import runs code from loud.py:x"
    assert running == "running"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("my_losses", "write `module:Name`"),
        ("my_losses:", "write `module:Name`"),
        (":Mine", "write `module:Name`"),
        (".relative:Mine", "not a module name"),
        ("my_losses:Yours", "has no `Yours`; it has: Mine"),
        ("no_such_module:Mine", "neither a module `no_such_module`"),
        ("no/such/file.py:Mine", "there is no file"),
    ],
)
def test_what_cannot_be_loaded_is_said(folder, spec, words):
    with pytest.raises(ConfigError, match=r"rewards\.0\.function") as caught:
        load_object(spec, what="rewards.0.function")
    assert words in str(caught.value)


def test_safe_mode_runs_nothing(folder):
    (folder / "boom.py").write_text("raise SystemError\n")
    with pytest.raises(ConfigError, match="--safe does not allow"):
        load_object("boom.py:x", what="objective.import", safe=True)


def test_a_missing_dependency_of_the_users_module_keeps_its_traceback(folder):
    (folder / "needy.py").write_text("import not_installed_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        load_object("needy:x", what="objective.import")


def test_a_file_that_is_no_python_is_named_with_its_line(folder):
    (folder / "broken.py").write_text("x = 1\ndef score(:\n")
    with pytest.raises(
        ConfigError, match=r"rewards\.0\.function: .*broken\.py:2 is not valid Pyth"
    ):
        load_object("broken.py:score", what="rewards.0.function")
