"""One entry of the recipe's `rewards` list. Imports pydantic alone."""

import re
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from alignkit.config.section import Section

KINDS = ("function", "model", "ensemble", "rewriter", "verifier", "length", "format")


class LengthReward(Section):
    """Soft penalty of long completions (Yu et al. 2025, arXiv:2503.14476, eq. 13): 0 up to
    max_tokens - buffer, then falling linearly to -1 at max_tokens.
    """

    max_tokens: PositiveInt = Field(description="from this many tokens on, the reward is -1")
    buffer: PositiveInt = Field(description="number of tokens over which it falls from 0 to -1")

    @model_validator(mode="after")
    def _fits(self) -> "LengthReward":
        if self.buffer > self.max_tokens:
            raise ValueError(f"buffer {self.buffer} is larger than max_tokens {self.max_tokens}")
        return self


class RewardConfig(Section):
    """A reward: exactly one of function, model, ensemble, rewriter, verifier, length and format,
    with its weight.
    """

    function: str | None = Field(
        None, description="`module:name` or `file.py:name` in TRL's reward-function signature"
    )
    model: str | None = Field(
        None, description="a sequence-classification model with one output: hub name or folder"
    )
    ensemble: Annotated[list[str], Field(min_length=2)] | None = Field(
        None, description="several such models; their mean is the reward"
    )
    steps: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="model: it was trained on steps (process_reward), and this text ends each of them; "
        "the score is the log-probability that they are right",
    )
    reduce: Literal["min", "product", "last"] = Field(
        "min", description="steps: which of a completion's steps count"
    )
    pessimism: NonNegativeFloat = Field(
        0.0,
        description="ensemble: so many standard deviations of the models are taken off their mean",
    )
    rewriter: str | None = Field(
        None,
        description="a language model trained by `data.rewrite`: it rewards the tokens that it would "
        "write itself",
    )
    ask: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="rewriter: the text that asks for a rewrite, as in its `data.rewrite`"
    )
    verifier: str | None = Field(
        None,
        description="`module:name` or `file.py:name` of a function "
        "f(prompt, completion, **columns) -> float, which runs in a process of its own",
    )
    length: LengthReward | None = Field(None, description="penalty of long completions")
    format: str | None = Field(
        None, description="regular expression: 1 where it matches the whole completion, else 0"
    )
    weight: float = Field(
        1.0, description="the rewards of a completion are summed with these weights"
    )
    credit: Literal["return", "to_go"] = Field(
        "return",
        description="a function that returns one number per token: a token gets the sum of all "
        "(return), or of its own and the later ones (to_go; only if the function is marked causal)",
    )
    on_bad: Literal["stop", "drop"] = Field(
        "stop",
        description="a row whose reward is nan, infinite or an exception stops the run (stop), "
        "or leaves the batch and is counted (drop)",
    )
    timeout: PositiveFloat | None = Field(
        None,
        description="seconds that one call may take; null: no limit for a function, "
        "10 for one completion of a verifier",
    )
    failed: float = Field(
        0.0,
        description="verifier: score of a completion that ran out of time or memory, or crashed",
    )
    workers: PositiveInt = Field(2, description="verifier: number of processes")
    memory_mb: PositiveInt = Field(
        4096, description="verifier: MiB of address space that one process may use"
    )
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
                f"a reward has exactly one of {', '.join(KINDS)}; "
                f"this one has {' and '.join(given) or 'none'}"
            )
        if self.pessimism and self.ensemble is None:
            raise ValueError(f"pessimism is for an ensemble, and this reward is a {self.kind}")
        if self.steps is not None and self.model is None:
            raise ValueError(f"steps are for a model, and this reward is a {self.kind}")
        if (self.ask is None) != (self.rewriter is None):
            raise ValueError("a rewriter and the text that asks it, `ask`, go together")
        if self.credit == "to_go" and self.function is None:
            raise ValueError(f"credit to_go is for a function, and this reward is a {self.kind}")
        return self

    @property
    def kind(self) -> str:
        """Which of function, model, ensemble, rewriter, verifier, length and format it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)
