"""The recipe's `train` section. Imports pydantic alone."""

from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

Moment = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(BaseModel):
    """Optimiser, schedule and rhythm of the one loop."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True
    )
    steps: PositiveInt | None = Field(
        300, le=10**12, description="optimiser steps; null with `epochs`"
    )
    epochs: PositiveFloat | None = Field(
        None, description="passes over the data; takes the place of `steps`"
    )
    batch_size: PositiveInt = Field(
        16, description="pairs or prompts per optimiser step over all processes"
    )
    micro_batch_tokens: Literal["auto"] | PositiveInt = Field(
        "auto", description="token budget of one forward; changes memory, not results"
    )
    learning_rate: PositiveFloat = Field(5e-4, description="peak learning rate")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="adamw or plain sgd")
    adam_betas: tuple[Moment, Moment] = Field((0.9, 0.999), description="AdamW moments")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled weight decay")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="learning-rate schedule after the warm-up"
    )
    warmup_steps: NonNegativeInt = Field(10, description="linear warm-up")
    max_grad_norm: NonNegativeFloat = Field(1.0, description="gradient clipping; 0 = off")
    max_skipped_steps: NonNegativeInt = Field(
        0, description="steps that may be left out because they are not finite; 0 = stop"
    )
    seed: NonNegativeInt = Field(
        0, lt=2**32, description="seeds data order, sampling noise and initialisation"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="compute dtype; bfloat16 is autocast over float32 weights"
    )
    process_timeout: PositiveFloat = Field(
        1800.0,
        le=10**7,
        description="seconds that processes wait for one that is slow or stuck before the run stops",
    )
    shard: bool = Field(
        False, description="shard weights, gradients and moments over the processes (FSDP2)"
    )
    eval_every: NonNegativeInt = Field(100, description="steps between evaluations; 0 = never")
    save_every: NonNegativeInt = Field(100, description="steps between checkpoints; 0 = never")
    log_samples_every: NonNegativeInt = Field(
        100, description="steps between sample generations; 0 = never"
    )
    keep: PositiveInt = Field(2, description="checkpoints kept besides the best")
    early_stopping: NonNegativeInt = Field(
        0, description="stop after this many evaluations without improvement; 0 = off"
    )
    metric: str = Field(
        "auto",
        description="what early stopping and keep-best watch; auto: eval_loss, online eval_reward",
    )
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="weight average of the policy written to model/; 0 = off"
    )
