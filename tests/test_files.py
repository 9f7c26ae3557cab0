"""Files that are whole or not there: what a killed process and a refusing disk leave behind."""

import errno
import os

import pytest

from alignkit import files


def test_a_torn_last_line_is_left_out(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert files.read_jsonl(file) == []
    files.append_jsonl(file, {"step": 1, "text": "ä"})
    files.append_jsonl(file, {"step": 2, "text": "\ud800"})  # not valid Unicode, but valid JSON
    rows = files.read_jsonl(file)
    assert [row["text"] for row in rows] == ["ä", "\ud800"]

    files.write_jsonl(file, rows, ensure_ascii=True)
    for torn in ('{"step": 3', '{"step": 3, "text": "ä"}'.encode()[:-3]):
        whole = file.read_bytes()
        file.write_bytes(whole + (torn if isinstance(torn, bytes) else torn.encode()))
        assert files.read_jsonl(file) == rows
        file.write_bytes(whole)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    for left_over in (".tmp-model", ".tmp-model-old"):  # of a killed attempt
        (tmp_path / left_over).mkdir()
        (tmp_path / left_over / "half").write_text("...")
    with files.replaced_folder(folder) as temporary:
        (temporary / "weights").write_text("first")
        assert not folder.exists()

    def fail_half_way():
        with files.replaced_folder(folder) as temporary:
            (temporary / "weights").write_text("second")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert (folder / "weights").read_text() == "first"

    with files.replaced_folder(folder) as temporary:
        (temporary / "weights").write_text("third")
    assert (folder / "weights").read_text() == "third"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_disk_that_refuses_leaves_the_old_text(tmp_path, monkeypatch):
    file = tmp_path / "recipe.yaml"
    files.write_text(file, "old")

    def refuse(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_lock_is_held_once(tmp_path):
    lock = tmp_path / ".lock"
    with files.locked(lock), pytest.raises(BlockingIOError), files.locked(lock, wait=False):
        pass
    with files.locked(lock, wait=False):
        pass
