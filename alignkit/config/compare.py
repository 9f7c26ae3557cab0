"""The recipe's `compare` section. Imports pydantic alone."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from alignkit.config.judges import JudgeConfig
from alignkit.config.rewards import RewardConfig
from alignkit.config.section import Section

Sections = dict[str, Any]


class CompareConfig(Section):
    """A grid of runs and how their results are measured. The other sections of the recipe (model,
    data, train, ...) apply to every run.
    """

    grid: Annotated[dict[str, Sections], Field(min_length=1)] = Field(
        description="label -> fields of the objective; a list of values makes one run per value, "
        "several lists make all combinations. The label is the objective's name unless `name` or "
        "`import` is among the fields"
    )
    overrides: dict[str, Sections] = Field(
        {}, description="label -> sections of the recipe that differ for its runs"
    )
    decode: dict[str, Sections] = Field(
        {},
        description="label -> a `decode` section that stands beside the grid, with its KL and its "
        "price; a list of values makes one decoder per value",
    )
    match_kl: list[PositiveFloat] = Field(
        [],
        description="KLs in nats at which every objective is compared: more runs of each label are "
        "trained until one ends within 10 % of each. The one field that a label sweeps is its "
        "strength, and the values written are where the search begins",
    )
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = Field(
        [0], description="every point is trained once per seed"
    )
    prompts: str | None = Field(
        None, description="prompts to evaluate on; null: data.eval, else those of the task"
    )
    max_prompts: PositiveInt | None = Field(
        None, description="evaluate on this many prompts only, the first ones"
    )
    samples: Annotated[int, Field(ge=2)] = Field(
        8, description="completions per prompt and model, with the same noise for all"
    )
    best_of: list[PositiveInt] = Field(
        [2, 4, 8, 16], description="the n of best-of-n, the baseline that needs no training"
    )
    base_samples: PositiveInt = Field(
        64,
        description="completions of the base model per prompt, to estimate the baselines from",
    )
    score: list[RewardConfig] = Field(
        [], description="the rewards to compare by; default: the recipe's rewards, else the task's"
    )
    judge: JudgeConfig | None = Field(
        None, description="who decides which of two completions wins; null: the higher score wins"
    )
    correct: float | None = Field(
        None, description="a completion with at least this score is correct; adds pass@k"
    )
    workers: Literal["auto"] | NonNegativeInt = Field(
        "auto",
        description="runs or decoders at the same time, each in a process with one thread; "
        "auto: one per core, or one on a GPU; 0: one after the other in this process",
    )

    @field_validator("match_kl")
    @classmethod
    def _distinct(cls, targets: list[float]) -> list[float]:
        twice = [target for target in targets if targets.count(target) > 1]
        if twice:
            raise ValueError(f"{twice[0]:g} stands twice; name each KL once")
        return targets
