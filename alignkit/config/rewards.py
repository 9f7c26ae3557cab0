"""One entry of the recipe's `rewards` list. Imports pydantic alone."""

import re
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)
KINDS = ("function", "model", "verifier", "length", "format")


class LengthReward(BaseModel):
    """Soft penalty of long completions (Yu et al. 2025, arXiv:2503.14476, eq. 13): 0 up to
    max_tokens - buffer, then falling linearly to -1 at max_tokens.
    """

    model_config = STRICT
    max_tokens: PositiveInt = Field(description="tokens from which on the reward is -1")
    buffer: PositiveInt = Field(description="tokens over which it falls from 0 to -1")

    @model_validator(mode="after")
    def _fits(self) -> "LengthReward":
        if self.buffer > self.max_tokens:
            raise ValueError(f"buffer {self.buffer} is larger than max_tokens {self.max_tokens}")
        return self


class RewardConfig(BaseModel):
    """A reward: exactly one of function, model, verifier, length and format, and how it counts."""

    model_config = STRICT
    function: str | None = Field(
        None, description="`module:name` or `file.py:name` in TRL's reward-function signature"
    )
    model: str | None = Field(
        None, description="a sequence-classification model with one output: hub name or folder"
    )
    verifier: str | None = Field(
        None,
        description="`module:name` or `file.py:name`: f(prompt, completion, **columns) -> float, in its own process",
    )
    length: LengthReward | None = Field(None, description="penalty of long completions")
    format: str | None = Field(
        None, description="regular expression: 1 where it matches the whole completion, else 0"
    )
    weight: float = Field(
        1.0, description="the rewards of a completion are summed with these weights"
    )
    on_bad: Literal["stop", "drop"] = Field(
        "stop",
        description="a row whose reward is nan, infinite or an exception stops the run, or is set aside and counted",
    )
    timeout: PositiveFloat | None = Field(
        None,
        description="seconds; null: 600 for a call of a function, 10 for one completion of a verifier",
    )
    failed: float = Field(
        0.0,
        description="verifier: score of a completion that ran out of time or memory, or crashed",
    )
    workers: PositiveInt = Field(2, description="verifier: processes")
    memory_mb: PositiveInt = Field(4096, description="verifier: address space of one process")
    revision: str | None = Field(None, description="model: hub revision")

    @field_validator("format")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> "RewardConfig":
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a reward has exactly one of {', '.join(KINDS)}; this one has {' and '.join(given) or 'none'}"
            )
        return self

    @property
    def kind(self) -> str:
        """Which of the kinds it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)
