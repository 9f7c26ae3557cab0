"""The recipe's `data` section. Imports pydantic alone."""

from datetime import date, datetime
from typing import Annotated, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    field_validator,
    model_validator,
)

from alignkit.config.row_sources import (
    ReweighConfig,
    RowSource,
    TrainSource,
    check_set_names,
    check_shares,
    check_streams,
)
from alignkit.config.section import Section


def _kind(value: object) -> str:
    """Which member of a union a value is meant to be, so that its faults alone are explained."""
    return "several" if isinstance(value, list | dict | RowSource) else "one"


def _kind_or_none(value: object) -> str:
    """The same where null is allowed."""
    return "none" if value is None else _kind(value)


Several = Annotated[list[TrainSource], Field(min_length=1)]
Train = Annotated[
    Annotated[str, Tag("one")] | Annotated[Several, Tag("several")], Discriminator(_kind)
]
NamedSource = Annotated[
    Annotated[str, Tag("one")] | Annotated[RowSource, Tag("several")], Discriminator(_kind)
]
Sets = Annotated[dict[str, NamedSource], Field(min_length=1)]
Eval = Annotated[
    Annotated[None, Tag("none")] | Annotated[str, Tag("one")] | Annotated[Sets, Tag("several")],
    Discriminator(_kind_or_none),
]


class ControlConfig(Section):
    """What goes before the prompts of labelled completions that `sft` learns."""

    desirable: Annotated[str, Field(min_length=1)] = Field(description="text of label true")
    undesirable: Annotated[str, Field(min_length=1)] = Field(description="text of label false")

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if self.desirable == self.undesirable:
            raise ValueError("both texts are the same, so that nothing tells the labels apart")
        return self


class DataConfig(Section):
    """Where the rows come from and how they become tokens."""

    train: Train = Field(
        "task:reviews",
        description="a file, a saved dataset folder, a hub name, or task:NAME; or a list of "
        "{source, share, split, subset, columns, max_rows}; with {objective, name, eval} these are streams",
    )
    reweigh: ReweighConfig | None = Field(
        None, description="streams: weights that follow their losses or rewards; null: the shares"
    )
    eval: Eval = Field(
        None,
        description="held-out rows, from the same kinds of source; or several sets: a mapping of "
        "names to sources or {source, split, subset, columns, max_rows}",
    )
    split: str = Field(
        "train",
        description="which split to read where a dataset has several, or a part of it: train[:90%]",
    )
    subset: str | None = Field(
        None, description="which configuration to read where a hub dataset has several"
    )
    eval_split: str | None = Field(
        None,
        description="split for `eval`, or a part of one such as train[90%:]; null: validation, test or "
        "eval, else `split` of another set",
    )
    eval_subset: str | None = Field(None, description="configuration for `eval`; null: `subset`")
    format: Literal[
        "auto",
        "pair",
        "ranking",
        "implicit_pair",
        "completion",
        "messages",
        "text",
        "labelled",
        "prompt",
    ] = Field("auto", description="row format; auto decides from the columns of all rows")
    columns: dict[str, str] = Field(
        {}, description="alignkit's column name -> the column name in the data"
    )
    chat_template: str | None = Field(
        None, description="Jinja template or a path to one, for tokenizers without their own"
    )
    template_time: str = Field(
        "auto",
        description="time that a chat template prints, as 2026-01-31T09:00; auto: when the run began",
    )
    max_length: Annotated[int, Field(ge=2)] = Field(
        1024, description="most tokens of prompt and completion; longer completions are cut"
    )
    truncate: Literal["end", "start"] = Field(
        "end", description="what rows above max_length lose: their end, or the prompt's beginning"
    )
    control: ControlConfig | None = Field(
        None,
        description="sft on labelled completions: {desirable: TEXT, undesirable: TEXT} go before the "
        "prompts as a system text",
    )
    rewrite: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="sft on pairs: learn to rewrite either answer of a pair into the chosen one, asked "
        "by this text behind the answer",
    )
    step_separator: str = Field(
        "\n", description="what ends every step of rows with labelled steps (completions, labels)"
    )
    append_eos: Literal["auto", True, False] = Field(
        "auto", description="end completions with EOS; auto: those of plain text, not of chats"
    )
    split_special_tokens: bool = Field(
        False, description="read special tokens inside the text as plain characters"
    )
    on_bad_row: Literal["error", "drop"] = Field(
        "error", description="malformed rows stop the run, or are dropped and counted"
    )
    workers: Literal["auto"] | PositiveInt = Field(
        1,
        description="processes that tokenise sets of many rows; auto: one for each core, at most 8",
    )

    def sources(self) -> list[TrainSource]:
        """The sources that are trained on: `train`, or those in its list that have no share of 0."""
        if isinstance(self.train, str):
            return [TrainSource(source=self.train)]
        return [source for source in self.train if source.share != 0]

    @property
    def has_streams(self) -> bool:
        """Whether the sources are streams: one of them has an objective of its own."""
        return any(source.objective is not None for source in self.sources())

    def task_source(self) -> str | None:
        """The first `task:NAME` that is trained on; None where there is none."""
        names = [source.source for source in self.sources()]
        return next((name for name in names if name.startswith("task:")), None)

    def held_out_sources(self) -> dict[str, RowSource]:
        """Name -> source of the held-out rows; one set that has no name stands under "". Those of a
        stream stand under its name.
        """
        if self.has_streams:
            return {
                stream.stream_name: RowSource(source=stream.eval)
                for stream in self.sources()
                if stream.eval is not None
            }
        if self.eval is None:
            return {}
        sets = {"": self.eval} if isinstance(self.eval, str) else self.eval
        return {
            name: RowSource(source=given) if isinstance(given, str) else given
            for name, given in sets.items()
        }

    def reading(self, source: RowSource) -> Self:
        """The section as it reads `source`, whose columns may be other ones."""
        if source.columns is None:
            return self
        return self.model_copy(update={"columns": source.columns})

    @field_validator("eval")
    @classmethod
    def _check_names(cls, value: Eval) -> Eval:
        if isinstance(value, dict):
            check_set_names(value)
        return value

    @field_validator("eval_split", mode="before")
    @classmethod
    def _names_a_split(cls, value: object) -> object:
        """A share of the rows, as other tools take it, is no split."""
        try:
            share = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return value
        percent = round(100 * (1 - share)) if 0.01 <= share <= 0.99 else 90
        raise ValueError(
            f"{share:g} is a number; to hold out a part of the rows, name the same source twice: "
            f"data.eval=SOURCE data.split=train[:{percent}%] data.eval_split=train[{percent}%:]"
        )

    @model_validator(mode="after")
    def _held_out_of_something(self) -> Self:
        """What is said of held-out rows is not left unread."""
        for field in ("eval_split", "eval_subset"):
            if self.eval is None and getattr(self, field) is not None:
                raise ValueError(
                    f"{field} is of the held-out rows, and there are none; set data.eval to their "
                    "source, which may be that of data.train"
                )
        return self

    @field_validator("train")
    @classmethod
    def _check_shares(cls, value: str | list[TrainSource]) -> str | list[TrainSource]:
        if not isinstance(value, str):
            check_shares(value)
            check_streams(value)
        return value

    @model_validator(mode="after")
    def _check_streams(self) -> Self:
        if self.has_streams and self.eval is not None:
            raise ValueError(
                "`eval` says nothing of the streams of `train`; give each of them its own, {eval: ...}"
            )
        if self.reweigh is not None and not self.has_streams:
            raise ValueError(
                "`reweigh` weighs streams, and no source of `train` has an objective of its own"
            )
        return self

    @field_validator("template_time", mode="before")
    @classmethod
    def _check_template_time(cls, value: object) -> object:
        """`auto` or a time in ISO 8601; YAML reads a bare date as one."""
        if isinstance(value, date):  # a datetime is one too
            return value.isoformat()
        if isinstance(value, str) and value != "auto":
            datetime.fromisoformat(value)
        return value
