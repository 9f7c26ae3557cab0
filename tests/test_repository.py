"""What git tracks: files of the project, and nothing that belongs to one machine."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _tracked(*options: str) -> list[str]:
    """What `git ls-files` prints with these options, one entry per line."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def test_no_link_is_tracked():
    """A link leads to a path of the machine it was made on."""
    assert [line for line in _tracked("--stage") if line.startswith("120000")] == []


def test_no_ignored_file_is_tracked():
    """An environment or a run's folder that was added by force would be in everybody's clone."""
    assert _tracked("--cached", "--ignored", "--exclude-standard") == []


def test_no_two_test_files_have_one_name():
    """pytest would refuse to collect the second one."""
    names = [Path(file).name for file in _tracked("tests") if Path(file).name.startswith("test_")]
    assert sorted(names) == sorted(set(names))
