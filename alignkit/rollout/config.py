"""The recipe's `rollout` section. Imports pydantic alone."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt


class RolloutConfig(BaseModel):
    """How online objectives sample completions."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)
    engine: Literal["auto", "hf", "vllm"] = Field("auto", description="who samples")
    url: str | None = Field(None, description="a vLLM server on a loopback address")
    completions: Annotated[int, Field(ge=2)] = Field(8, description="completions per prompt")
    max_new_tokens: PositiveInt = Field(64, description="cap on tokens per completion")
    temperature: PositiveFloat = Field(1.0, description="of the run's samples; training needs 1, which its log-probs describe")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="nucleus mass of the run's samples; training needs 1")
