"""Parts of a split, written as `datasets` writes them: train[:90%], train[90%:], train[100:200]."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

SLICE = re.compile(r"([^\[\]]+)\[(-?\d+%?)?:(-?\d+%?)?\]")


@dataclass(frozen=True)
class Slice:
    """Rows from `start` to before `stop`, each a number of rows or of percent, "" for an end."""

    start: str
    stop: str

    def of(self, rows: Iterable[Any]) -> Iterator[Any]:
        """These of the `rows`, which are gone through twice."""
        total = sum(1 for _ in rows)
        bounds = slice(_place(self.start, total), _place(self.stop, total))
        first, last, _ = bounds.indices(total)
        yield from islice(rows, first, last)


def without_slice(splits: Sequence[str]) -> tuple[tuple[str, ...], Slice | None]:
    """The splits' names, and which part of the only one is asked for; None: all of it."""
    match = SLICE.fullmatch(splits[0]) if len(splits) == 1 else None
    if match is None:
        return tuple(splits), None
    name, start, stop = match.groups(default="")
    return (name,), Slice(start, stop)


def _place(text: str, total: int) -> int | None:
    """A bound as a number of rows, rounded as `datasets` does it."""
    if not text:
        return None
    return round(int(text[:-1]) * total / 100) if text.endswith("%") else int(text)
