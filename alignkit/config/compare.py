"""The recipe's `compare` section. Imports pydantic alone."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from alignkit.config.judges import JudgeConfig
from alignkit.config.rewards import RewardConfig

Sections = dict[str, Any]


class CompareConfig(BaseModel):
    """A grid of runs and how their results are measured. What is not in here (model, data, train,
    ...) is the recipe's own.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True
    )
    grid: Annotated[dict[str, Sections], Field(min_length=1)] = Field(
        description="label -> fields of the objective; a list of values makes a run of each, several lists all combinations. "
        "The label is the objective's name unless `name` or `import` says otherwise"
    )
    overrides: dict[str, Sections] = Field(
        {}, description="label -> sections of the recipe that differ for its runs"
    )
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = Field(
        [0], description="every point is trained once per seed"
    )
    prompts: str | None = Field(
        None, description="prompts to evaluate on; null: data.eval, else those of the task"
    )
    max_prompts: PositiveInt | None = Field(None, description="only the first so many of them")
    samples: Annotated[int, Field(ge=2)] = Field(
        8, description="completions per prompt and model, with the same noise for all"
    )
    best_of: list[PositiveInt] = Field(
        [2, 4, 8, 16], description="the n of best-of-n, the baseline that needs no training"
    )
    base_samples: PositiveInt = Field(
        64, description="completions of the base per prompt that the baselines are estimated from"
    )
    score: list[RewardConfig] = Field(
        [], description="what is compared; default: the recipe's rewards, else the task's"
    )
    judge: JudgeConfig | None = Field(
        None, description="who says which of two completions wins; null: the higher score"
    )
    correct: float | None = Field(
        None, description="a completion that scores at least this is right: adds pass@k"
    )
    workers: Literal["auto"] | NonNegativeInt = Field(
        "auto",
        description="runs at a time, each in a process with one thread; auto: one per core, on a GPU one; 0: in here",
    )
