"""One of several sources of rows in a recipe's `data` section. Imports pydantic alone."""

from pydantic import Field, NonNegativeFloat, PositiveInt

from alignkit.config.section import Section


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
