"""One of several sources of rows in a recipe's `data` section. Imports pydantic alone."""

import re
from collections.abc import Mapping

from pydantic import Field, NonNegativeFloat, PositiveInt

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


def check_set_names(names: Mapping[str, object]) -> None:
    """ValueError where a name cannot stand in the name of a metric."""
    for name in names:
        if not SET_NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is no name for held-out rows, which stands in names such as eval_NAME_loss; "
                "use letters, digits, dots, hyphens and single underscores"
            )
