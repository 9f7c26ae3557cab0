"""Files as a training run needs them: whole or not there, synced, locked and hashed. Standard
library only.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from alignkit.errors import ResourceError


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_parts(parts: Iterable[bytes]) -> str:
    """SHA-256 of some bytes under one another, in hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """SHA-256 of a JSON value, in hex; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def vocabulary_hash(vocabulary: Mapping[str, int]) -> str:
    """Hash of a tokenizer's vocabulary, ids included."""
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path`. Readers see the old text or the new one, whole; OSError where
    the disk refuses.
    """
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """`write_text` of a JSON value. ValueError for numbers that are not finite: JSON has none."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def write_jsonl(
    path: Path, rows: Sequence[Mapping[str, Any]], *, ensure_ascii: bool = False
) -> None:
    """`write_text` of one JSON object per line. With `ensure_ascii`, other characters are written
    as escapes: text that is not valid Unicode needs that.
    """
    lines = [json.dumps(row, ensure_ascii=ensure_ascii) + "\n" for row in rows]
    write_text(path, "".join(lines))


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON object as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file that this package wrote; none where there is no file.

    A process that is killed may leave half a line at the end. Reading stops there.
    """
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows

    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk refuses inside the block into a ResourceError that names `path`.

    A full disk, one without inodes, a folder that may not be written to: libraries written in Rust
    raise errors of their own for these.
    """
    try:
        yield
    except Exception as error:
        reason = refusal_of_disk(error)
        if reason is None:
            raise
        raise ResourceError(
            f"cannot write {path}: {reason}; free space or name another place, then run the "
            "command again"
        ) from error


def refusal_of_disk(error: BaseException) -> str | None:
    """What the disk refused, in words; None for an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors: "I/O error: ...", tokenizers: a bare Exception; both end in "(os error 28)"
    text = str(error)
    by_rust = type(error).__name__ == "SafetensorError" or "(os error " in text
    return text.strip().partition("\n")[0] if by_rust else None


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends without an exception.

    Readers see the old file or the new one, whole; an exception leaves `path` as it was. OSError
    where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` when the block ends without an
    exception.

    Every file in it is synced before the rename. What an earlier, killed attempt left is removed
    first; an exception leaves `folder` as it was. OSError where the disk refuses.
    """
    temporary = folder.with_name(f".tmp-{folder.name}")
    previous = folder.with_name(f".tmp-{folder.name}-old")
    for left_over in (temporary, previous):
        shutil.rmtree(left_over, ignore_errors=True)

    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.rglob("*"):
            fsync(path)
        fsync(temporary)

        # Moved aside and not deleted in place: nobody ever sees half of it.
        if folder.exists():
            folder.rename(previous)
        temporary.rename(folder)
        fsync(folder.parent)
    finally:
        for left_over in (temporary, previous):
            shutil.rmtree(left_over, ignore_errors=True)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[BinaryIO]:
    """Hold the operating system's lock on the file `path`, made if it is not there.

    A process that dies gives the lock back. Without `wait`, BlockingIOError where another process
    holds it.
    """
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield file
