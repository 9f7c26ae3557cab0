"""The recipe's `iterate` section. Imports pydantic alone."""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from alignkit.config.section import Section
from alignkit.config.train import TrainConfig

PairMethod = Literal["bradley_terry", "best_worst", "rejection", "tree"]
MOST_ROUNDS = 100


class StudentConfig(Section):
    """A small reward model that proposes each round's pairs, for the recipe's `rewards` to label, and
    that learns from the labels (TS-Align, Zhang et al. 2024, arXiv:2405.20215).
    """

    model: Annotated[str, Field(min_length=1)] = Field(
        description="the reward model of the first round: a folder or hub name"
    )
    train: TrainConfig | None = Field(
        None,
        description="how it is trained on the labels of a round, which the next one begins with; "
        "null: it stays as it is",
    )


class RoundPairsConfig(Section):
    """How each round makes its pairs from the model that the round before ended with. The recipe's
    `rewards`, else the task's own, score the completions.
    """

    prompts: str | None = Field(
        None, description="a file, a dataset folder, a hub name, or task:NAME; null: data.train"
    )
    method: PairMethod = Field("bradley_terry", description="as in `alignkit pairs`")
    samples: Annotated[int, Field(ge=2)] = Field(4, description="completions per prompt")
    per_prompt: PositiveInt = Field(1, description="most pairs per prompt (best_worst: one)")
    label_temperature: NonNegativeFloat = Field(
        1.0, description="the first wins with probability sigmoid(difference / this)"
    )
    beta: Annotated[list[PositiveFloat], Field(min_length=1)] = Field(
        [0.5],
        description="rejection: samples of model * exp(score / beta); one number per round, each "
        "smaller than the last, goes to the last of them in stages, as the models follow",
    )
    temperature: PositiveFloat = Field(1.0, description="of the sampling")
    student: StudentConfig | None = Field(
        None,
        description="bradley_terry: a reward model that proposes the pairs, its best completions "
        "against its worst; the recipe's rewards are asked about these alone",
    )

    @field_validator("beta", mode="before")
    @classmethod
    def _one_alone(cls, beta: object) -> object:
        return [beta] if isinstance(beta, int | float) else beta

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.method == "tree" and (self.samples < 4 or self.samples % 2):
            raise ValueError(
                f"the method tree with {self.samples} samples; an even number from 4 on"
            )
        if self.student is not None and self.method != "bradley_terry":
            raise ValueError(
                f"a student proposes the pairs, and the method {self.method} would choose them "
                "otherwise; take bradley_terry"
            )
        for one, other in pairwise(self.beta):
            if other >= one:
                raise ValueError(
                    f"beta has {other:g} after {one:g}: each round of staged rejection is stricter, "
                    "so give falling numbers"
                )
        return self

    def beta_of(self, number: int) -> float:
        """The strength by which round `number`, counted from 1, accepts its completions.

        With stages the model of the round before already stands for exp(score / beta before), so only
        the rest is asked for: 1 / (1 / beta - 1 / beta before). Dong et al. 2024 (arXiv:2312.11456).
        """
        if number == 1 or len(self.beta) == 1:
            return self.beta[0]
        return 1 / (1 / self.beta[number - 1] - 1 / self.beta[number - 2])


class IterateConfig(Section):
    """Rounds of training, each from the model that the round before ended with."""

    rounds: int = Field(3, ge=1, le=MOST_ROUNDS, description="how many; more can be added later")
    reference: Literal["first", "previous"] = Field(
        "first",
        description="what anchors the KL of a round: the model that all began with, or the one that "
        "the round begins with, so that the rewards of the rounds add up",
    )
    pairs: RoundPairsConfig | None = Field(
        None, description="make pairs anew in each round; null: data.train as it is in all of them"
    )
    prompts: str | None = Field(
        None, description="prompts that the report measures on; null: data.eval, else the task's"
    )
    samples: Annotated[int, Field(ge=2)] = Field(
        8, description="completions per prompt and model in the report, with the same noise for all"
    )

    @model_validator(mode="after")
    def _one_stage_per_round(self) -> Self:
        stages = len(self.pairs.beta) if self.pairs else 1
        if stages not in (1, self.rounds):
            raise ValueError(
                f"pairs.beta has {stages} numbers for {self.rounds} rounds; give one, or one per round"
            )
        return self
