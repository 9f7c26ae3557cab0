"""The cache of made folders: whole or absent, made once, never in the way of the next try."""

import threading
import time
from pathlib import Path

import pytest

from alignkit.errors import ResourceError
from alignkit.files import cache_root, cached_folder
from alignkit.tasks.worker import run_apart


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_a_folder_is_made_once(root):
    calls = []

    def build(folder):
        calls.append(folder)
        assert visible(root) == [folder.name]  # nothing bears the final name yet
        (folder / "file").write_text("whole")

    first = cached_folder("world-1", build)
    assert first == root / "world-1" == cached_folder("world-1", build)
    assert (first / "file").read_text() == "whole"
    assert len(calls) == 1
    assert visible(root) == ["world-1"]


def test_a_failed_build_leaves_nothing_and_can_be_tried_again(root):
    def fails(folder):
        (folder / "half").write_text("...")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cached_folder("world", fails)
    assert visible(root) == []
    assert list(cached_folder("world", lambda folder: None).iterdir()) == []


def test_what_a_killed_build_left_is_cleared_and_other_worlds_are_left_alone(root):
    for name in (".tmp-world", ".tmp-other"):
        (root / name).mkdir(parents=True)
        (root / name / "half").write_text("...")
    assert list(cached_folder("world", lambda folder: None).iterdir()) == []
    assert visible(root) == [".tmp-other", "world"]


def test_of_several_at_once_one_builds_and_the_others_wait(root):
    built, found = [], []

    def build(folder):
        built.append(folder)
        time.sleep(0.2)
        (folder / "file").write_text("whole")

    threads = [
        threading.Thread(
            target=lambda: found.append((cached_folder("world", build) / "file").read_text())
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["whole"] * 4
    assert len(built) == 1


def test_a_cache_that_cannot_be_written_is_named_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALIGNKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        ResourceError,
        match=r"cannot write to the cache .*file: .*; set ALIGNKIT_CACHE to another folder",
    ):
        cached_folder("world", lambda folder: None)


def test_without_the_variable_the_cache_is_the_users(monkeypatch):
    monkeypatch.delenv("ALIGNKIT_CACHE")
    assert cache_root() == Path.home().resolve() / ".cache" / "alignkit"


def test_a_world_is_made_where_stderr_has_no_descriptor(tmp_path, caplog):
    """As under pytest's capture and in notebooks; a world that does not exist ends at once, with
    its name.
    """
    with pytest.raises(
        ResourceError,
        match=r"the task `no_such_world` could not be made \(its process ended with exit code 1\)",
    ):
        run_apart("no_such_world", tmp_path / "folder")
    assert "making the task `no_such_world`" in caplog.text
