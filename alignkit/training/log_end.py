"""The end of a JSONL log: what a long run needs of it when it is resumed, without the rest."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from alignkit.files import check_no_link, json_object, replaced_file

_BLOCK = 1 << 18  # bytes that are read at once
_LOOKED_AT = 1 << 20  # bytes before the last row in which damaged lines are looked for


def rows_backwards(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file from the last to the first, read as they are asked for. Lines that
    hold no JSON object are left out; nothing comes where there is no file.
    """
    rows = (json_object(line) for _, line in _lines_backwards(path))
    return (row for row in rows if row is not None)


def cut_behind(path: Path, wanted: Callable[[Mapping[str, Any]], bool]) -> int:
    """Cut off all lines behind the last row that is `wanted`; returns how many lines had to go
    because they hold no JSON object.

    In the MiB before that row, lines that are not wanted go as well. What stands before is not
    looked at, so a file may be as long as it likes. OSError where the disk refuses or `path` is a
    link.
    """
    check_no_link(path)
    unreadable = 0
    end = 0  # of the last row that stays, in bytes
    start = 0  # of what has been looked at
    staying: list[bytes] = []  # the last one first
    some_go = False  # whether one before `end` has to go

    for place, line in _lines_backwards(path):
        row = json_object(line)
        unreadable += row is None
        if row is not None and wanted(row):
            end = end or place + len(line)
            staying.append(line)
        elif end:
            some_go = True

        start = place
        if end and end - start >= _LOOKED_AT:
            break

    if some_go or (staying and not staying[0].endswith(b"\n")):
        _replace_end(path, start, [line.rstrip(b"\n") + b"\n" for line in reversed(staying)])
    elif path.exists():
        os.truncate(path, end)
    return unreadable


def _lines_backwards(path: Path) -> Iterator[tuple[int, bytes]]:
    """Every line of a file from the last to the first, with the place (in bytes) where it begins."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return

    with file:
        start = file.seek(0, os.SEEK_END)
        rest = b""  # the line that begins before `start`, as far as it has been read
        while start:
            size = min(_BLOCK, start)
            start -= size
            file.seek(start)
            rest, *lines = _split(file.read(size) + rest)

            place = start + len(rest) + sum(map(len, lines))
            for line in reversed(lines):
                place -= len(line)
                yield place, line
        if rest:
            yield 0, rest


def _split(text: bytes) -> list[bytes]:
    """The lines of `text` with their ends. JSON may hold other characters that end a line."""
    *lines, last = text.split(b"\n")
    return [line + b"\n" for line in lines] + ([last] if last else [])


def _replace_end(path: Path, start: int, lines: list[bytes]) -> None:
    """Put `lines` in the place of everything from byte `start` on; the file is old or new, whole."""
    with replaced_file(path) as temporary, path.open("rb") as old, temporary.open("wb") as new:
        while block := old.read(min(_BLOCK, start - old.tell())):
            new.write(block)
        new.writelines(lines)
