"""The recipe's `data` section. Imports pydantic alone."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


class DataConfig(BaseModel):
    """Where the rows come from and how they become tokens."""

    model_config = STRICT
    train: str = Field(
        "task:reviews", description="a file, a saved dataset folder, a hub name, or task:NAME"
    )
    eval: str | None = Field(None, description="the same for held-out rows")
    split: str = Field("train", description="split of a hub dataset or dataset folder with several")
    subset: str | None = Field(None, description="configuration of a hub dataset that has several")
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
    columns: dict[str, str] = Field({}, description="our name -> the file's column name")
    chat_template: str | None = Field(
        None, description="Jinja template or a path to one, for tokenizers without their own"
    )
    max_length: Annotated[int, Field(ge=2)] = Field(
        1024, description="tokens of prompt + completion; longer completions are cut"
    )
    append_eos: Literal["auto", True, False] = Field(
        "auto", description="auto: append to plain text, not to chats"
    )
    split_special_tokens: bool = Field(
        False, description="read special tokens inside the text as plain characters"
    )
    on_bad_row: Literal["error", "drop"] = Field(
        "error", description="malformed rows stop the run, or are dropped and counted"
    )
