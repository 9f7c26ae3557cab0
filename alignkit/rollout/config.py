"""The recipe's `rollout` section. Imports pydantic alone."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator


class RolloutConfig(BaseModel):
    """How online objectives sample completions."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)
    engine: Literal["auto", "hf", "vllm"] = Field("auto", description="who samples")
    url: str | None = Field(None, description="a vLLM server on a loopback address")
    completions: Annotated[int, Field(ge=2)] = Field(8, description="completions per prompt")
    max_new_tokens: PositiveInt = Field(64, description="cap on tokens per completion")
    temperature: PositiveFloat = Field(1.0, description="of the run's samples; training needs 1, which its log-probs describe")
    pass_rate: tuple[float, float] | None = Field(
        None, description="learn from prompts whose mean score is strictly between these; null = from all"
    )
    refills: NonNegativeInt = Field(3, description="pass_rate: further batches of prompts tried until a step has enough")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="nucleus mass of the run's samples; training needs 1")

    @model_validator(mode="after")
    def _an_interval(self) -> "RolloutConfig":
        if self.pass_rate is not None and not self.pass_rate[0] < self.pass_rate[1]:
            raise ValueError(f"pass_rate goes from low to high, such as [0.1, 0.9]; got {list(self.pass_rate)}")
        return self
