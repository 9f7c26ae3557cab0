"""One of several sources of rows in a recipe's `data` section. Imports pydantic alone."""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from alignkit.config.section import Section

SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(_[A-Za-z0-9.-]+)*", re.ASCII)


class RowSource(Section):
    """A source of rows and what of it is read. What is null is as in the `data` section."""

    source: str = Field(
        min_length=1, description="a file, a saved dataset folder, a hub name, or task:NAME"
    )
    split: str | None = Field(None, description="which split to read where there are several")
    subset: str | None = Field(None, description="which configuration of a hub dataset to read")
    columns: dict[str, str] | None = Field(
        None, description="alignkit's column name -> the column name in this source"
    )
    max_rows: PositiveInt | None = Field(
        None, description="read the first rows alone, this many of them"
    )


class TrainSource(RowSource):
    """One source of a mixture."""

    share: NonNegativeFloat | None = Field(
        None,
        description="its part of an epoch, relative to the other shares; 0 leaves it out; "
        "null for all: each row once",
    )
    objective: dict[str, Any] | None = Field(
        None,
        description="an objective of its own, in place of the recipe's: the source is then a stream, "
        "with its own rows in each step; null for all: one objective learns from all rows",
    )
    name: str | None = Field(
        None, description="streams: stands before its metrics; null: its objective's name"
    )
    eval: str | None = Field(None, description="streams: its held-out rows, as `data.eval`")

    @property
    def stream_name(self) -> str:
        """What stands before the metrics of a stream."""
        section = self.objective or {}
        return self.name or str(section.get("name") or section.get("import", "")).split(":")[-1]


class ReweighConfig(Section):
    """Weights of streams that follow how their losses or rewards develop (RECAP, arXiv:2510.21978).

    The published signals are not known in every detail, so what this gains is a hypothesis.
    """

    window: int = Field(
        10, ge=2, description="steps of a window; the last one is compared with the one before"
    )
    temperature: PositiveFloat = Field(
        1.0, description="how little the signals move the weights; infinitely high: all 1"
    )


def rows_by_share(shares: Sequence[float], total: int) -> list[int]:
    """`total` rows divided in proportion to `shares`, each count less than one row off.

    Largest remainders: all shares are rounded down, and those that lose most get one row more.
    """
    whole = sum(map(Fraction, shares))
    exact = [Fraction(share) * total / whole for share in shares]
    counts = [int(rows) for rows in exact]
    by_loss = sorted(range(len(shares)), key=lambda place: counts[place] - exact[place])
    for place in by_loss[: total - sum(counts)]:
        counts[place] += 1
    return counts


def check_shares(sources: list[TrainSource]) -> None:
    """ValueError where the shares say nothing: some are missing, or all are zero."""
    shares = [source.share for source in sources]
    without = [source.source for source in sources if source.share is None]
    if without and len(without) < len(sources):
        raise ValueError(
            f"{', '.join(without)} has no share and others have one; "
            "give every source a share, or none, which reads each row once"
        )
    if not without and not any(shares):
        raise ValueError("the shares sum to 0; give at least one source a share above 0")


def check_streams(sources: list[TrainSource]) -> None:
    """ValueError where the sources are neither all streams nor all rows of one objective, and for
    streams without a share, or with names that cannot be told apart.
    """
    streams = [source for source in sources if source.objective is not None]
    others = [source for source in sources if source.objective is None]
    if not streams:
        named = [source.source for source in others if source.name or source.eval]
        if named:
            raise ValueError(
                f"{named[0]} has a `name` or an `eval`, which only streams have: give every source an "
                "`objective`, or leave them out"
            )
        return

    if others:
        raise ValueError(
            f"{others[0].source} has no objective and others have one; give every source one, or none"
        )
    if any(stream.share is None for stream in streams):
        raise ValueError("streams need shares; give every source one, such as share: 1")

    nameless = next((stream for stream in streams if not stream.stream_name), None)
    if nameless is not None:
        raise ValueError(
            f"the objective of {nameless.source} has no name; give it one, such as {{name: sft}}"
        )
    names = [stream.stream_name for stream in streams]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two streams are called {twice!r}; give them names, {{name: ...}}")
    check_set_names(dict.fromkeys(names), "a stream")


def check_set_names(names: Mapping[str, object], what: str = "held-out rows") -> None:
    """ValueError where a name cannot stand in the name of a metric."""
    for name in names:
        if not SET_NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is no name for {what}, which stands in names such as eval_NAME_loss; "
                "use letters, digits, dots, hyphens and single underscores"
            )
