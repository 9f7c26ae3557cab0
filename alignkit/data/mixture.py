"""Several sources of rows as one data set: how many rows of each an epoch has."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from alignkit.config.row_sources import TrainSource, rows_by_share
from alignkit.data.report import Report
from alignkit.errors import DataError

if TYPE_CHECKING:
    from alignkit.batches import Bundle
    from alignkit.data.prompts import Prompt

T = TypeVar("T", "Bundle", "Prompt")


@dataclass(frozen=True)
class Part(Generic[T]):
    """What was read of one source."""

    source: TrainSource
    rows: Sequence[T]
    report: Report


@dataclass(frozen=True)
class Mixture(Generic[T]):
    """The rows of all sources. An epoch has as many rows as all sources have together; where they
    have shares, it visits those of a source in proportion to its share.
    """

    parts: Sequence[Part[T]]

    @cached_property
    def rows(self) -> Sequence[T]:
        """Those of all sources, one source behind the other."""
        if len(self.parts) == 1:
            return self.parts[0].rows
        if all(isinstance(part.rows, list) for part in self.parts):
            return list(chain.from_iterable(part.rows for part in self.parts))

        from alignkit.policies.lazy import Joined

        rows: list[Any] = [part.rows for part in self.parts]
        joined: Any = Joined(rows)
        return joined

    @property
    def sizes(self) -> list[int]:
        """How many rows each source has."""
        return [len(part.rows) for part in self.parts]

    @cached_property
    def counts(self) -> list[int] | None:
        """How many rows of each source an epoch visits; None where each row is visited once."""
        shares = [part.source.share for part in self.parts]
        if len(shares) == 1 or None in shares:
            return None
        total = sum(self.sizes)
        counts = rows_by_share([share for share in shares if share is not None], total)
        for part, count in zip(self.parts, counts):
            if not count:
                raise DataError(
                    f"data.train: {part.source.source} has share {part.source.share:g}, which is no "
                    f"row of an epoch of {total}; give a larger share, or 0 to leave it out"
                )
        return counts

    @property
    def format(self) -> str:
        """The rows' format; `auto` where the sources differ, so that each is decided again."""
        formats = {part.report.format for part in self.parts}
        return formats.pop() if len(formats) == 1 else "auto"

    def identity(self) -> dict[str, Any]:
        """What decides the order of the rows beside themselves and the seed."""
        if self.counts is None:
            return {}
        return {"mixture": [list(pair) for pair in zip(self.sizes, self.counts)]}

    def lines(self) -> list[str]:
        """The reports on the sources, and how much of an epoch each of them is."""
        lines = [line for part in self.parts for line in part.report.lines()]
        if self.counts is None:
            return lines

        total = sum(self.counts)
        for part, count in zip(self.parts, self.counts):
            lines.append(
                f"{part.source.source}: {count} of {total} rows of an epoch ({count / total:.1%}), "
                f"each of its {len(part.rows)} rows {count / len(part.rows):.2f} times"
            )
        return lines
