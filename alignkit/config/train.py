"""The recipe's `train` section. Imports pydantic alone."""

from importlib.util import find_spec
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from alignkit.config.section import Section
from alignkit.errors import ConfigError

Moment = Annotated[float, Field(ge=0, lt=1)]
Goal = Literal["min", "max"]

# Whether less or more is better, for the held-out metrics that alignkit measures.
GOALS: dict[str, Goal] = {
    "eval_loss": "min",
    "eval_calibration_error": "min",
    "eval_brier": "min",
    "eval_position_inconsistency": "min",
    "eval_reward": "max",
    "eval_accuracy": "max",
    "eval_rewards/accuracies": "max",
    "eval_rewards/margins": "max",
    "eval_rewards/probabilities": "max",
    "eval_rewards/chosen": "max",
}


def known_goal(metric: str) -> Goal | None:
    """Whether less or more of a held-out metric is better, also of one of several held-out sets
    (`eval_NAME_loss`); None where that is not known.
    """
    names = (name for name in GOALS if metric.endswith(name.removeprefix("eval")))
    longest = max(names, key=len, default=None)
    return GOALS[longest] if longest and metric.startswith("eval_") else None


class MeshConfig(Section):
    """How the processes of `train.shard` stand: `replicate` times a whole model is spread over
    `shard` times `tensor` processes, of which the `tensor` ones compute each forward together.
    """

    replicate: PositiveInt = Field(1, description="groups that each hold the model")
    shard: PositiveInt | None = Field(
        None, description="processes over which a group spreads it; null: all that are left"
    )
    tensor: PositiveInt = Field(
        1,
        description="processes that compute with parts of each matrix, by the model's tp_plan",
    )

    def shape(self, processes: int) -> dict[str, int]:
        """The size of each dimension of the mesh. ConfigError unless it holds all processes."""
        others = self.replicate * self.tensor
        shard = self.shard or max(1, processes // others)
        if others * shard == processes:
            return {"replicate": self.replicate, "shard": shard, "tensor": self.tensor}

        sizes = {"replicate": self.replicate, "shard": self.shard, "tensor": self.tensor}
        given = ", ".join(f"{name}: {size}" for name, size in sizes.items() if size is not None)
        raise ConfigError(
            f"train.mesh: {{{given}}} does not divide the run's {processes} processes; replicate "
            "times shard times tensor must be their number"
        )


class ResetConfig(Section):
    """Elastic Reset (Noukhovitch et al. 2023, arXiv:2312.07551): every so many steps the policy goes
    back to the moving average of its weights, and the average to where training began.
    """

    every: PositiveInt = Field(description="steps between two resets")
    decay: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.995, description="share of itself that the average keeps in a step"
    )


class TrainConfig(Section):
    """Optimiser, schedule, and how often the loop evaluates and saves."""

    steps: PositiveInt | None = Field(
        300, le=10**12, description="optimiser steps; null where `epochs` is given"
    )
    epochs: PositiveFloat | None = Field(
        None, description="passes over the data, instead of `steps`"
    )
    batch_size: PositiveInt = Field(
        16, description="pairs or prompts per optimiser step over all processes"
    )
    micro_batch_tokens: Literal["auto"] | PositiveInt = Field(
        "auto", description="token budget of one forward pass; changes the memory, not the results"
    )
    learning_rate: PositiveFloat = Field(5e-4, description="peak learning rate")
    optimizer: Literal["adamw", "sgd", "adafactor", "muon", "adamw_8bit"] = Field(
        "adamw",
        description="torch's AdamW, plain SGD, Adafactor, or Muon with AdamW on embeddings, head and "
        "vectors; adamw_8bit needs bitsandbytes",
    )
    adam_betas: tuple[Moment, Moment] = Field(
        (0.9, 0.999), description="decay of AdamW's two moments"
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled weight decay")
    schedule: Literal["cosine", "linear", "constant", "wsd", "inverse_sqrt"] = Field(
        "cosine",
        description="learning-rate schedule after the warm-up; wsd: constant, then a fall at the end",
    )
    decay_steps: PositiveInt | None = Field(
        None, description="wsd: steps of the fall at the end; null: a tenth of the run"
    )
    learning_rate_floor: float = Field(
        0.0, ge=0, lt=1, description="share of learning_rate that the schedule falls to"
    )
    warmup_steps: NonNegativeInt = Field(10, description="steps of linear warm-up")
    max_grad_norm: NonNegativeFloat = Field(
        1.0, description="gradients are clipped to this norm; 0 = off"
    )
    router_aux_loss: Literal["auto"] | NonNegativeFloat = Field(
        "auto",
        description="mixtures of experts: weight of the loss that balances their routers; "
        "auto: the model config's coefficient; 0 = off",
    )
    max_skipped_steps: NonNegativeInt = Field(
        0,
        description="steps with a loss or gradient that is not finite are skipped up to this often; "
        "0 = stop at the first",
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
        description="seconds that processes wait for one that is slow or stuck "
        "before the run stops",
    )
    shard: bool = Field(
        False, description="shard weights, gradients and moments over the processes (FSDP2)"
    )
    mesh: MeshConfig | None = Field(
        None,
        description="`{replicate, shard, tensor}` of train.shard, such as machines and the GPUs of "
        "each; null: one shard per process",
    )
    reduce_dtype: Literal["float32"] | None = Field(
        None,
        description="dtype in which train.shard sums gradients over processes; "
        "null: that of the weights",
    )
    offload: bool = Field(
        False,
        description="keep the optimiser's state in the CPU's memory between steps; changes no result",
    )
    eval_every: NonNegativeInt = Field(100, description="steps between evaluations; 0 = never")
    save_every: NonNegativeInt = Field(
        100,
        description="steps between checkpoints; 0 = never: model/ is written at the end all the same, "
        "and so is a checkpoint at a signal and, with early_stopping, at the best step",
    )
    log_samples_every: NonNegativeInt = Field(
        100, description="steps between sample generations; 0 = never"
    )
    keep: PositiveInt = Field(2, description="how many checkpoints are kept, besides the best")
    early_stopping: NonNegativeInt = Field(
        0, description="stop after this many evaluations without improvement; 0 = off"
    )
    callbacks: list[str] = Field(
        [],
        description="classes of your own, `file.py:Class` or `module:Class`, that are told of the "
        "run's events as transformers' TrainerCallback",
    )
    compute_metrics: str | None = Field(
        None,
        description="function of your own, `file.py:function` or `module:function`, that makes "
        "further metrics of transformers' EvalPrediction of held-out rows",
    )
    metric: str = Field(
        "auto",
        description="what early stopping and the best checkpoint go by; "
        "auto: eval_loss, or eval_reward for online objectives",
    )
    metric_goal: Literal["auto", "min", "max"] = Field(
        "auto",
        description="whether less or more of `metric` is better; auto knows losses, rewards, "
        "accuracies and margins",
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the average of the weights that is written to model/; 0 = off",
    )

    reset: ResetConfig | None = Field(
        None, description="reset the policy to a moving average of its weights; null = never"
    )

    @model_validator(mode="after")
    def _optimizer_can_run(self) -> Self:
        """8-bit moments need a package, and Muon needs whole matrices."""
        if self.optimizer == "adamw_8bit" and find_spec("bitsandbytes") is None:
            raise ValueError(
                "optimizer adamw_8bit needs the package bitsandbytes, which is not installed; "
                "install it, or use optimizer: adamw (or adafactor, whose state is small too)"
            )
        if self.optimizer == "muon" and self.shard:
            raise ValueError(
                "optimizer muon works on whole matrices, and shard: true cuts them into parts; "
                "use optimizer: adamw, or shard: false"
            )
        if self.optimizer == "adafactor" and self.shard:
            raise ValueError(
                "optimizer adafactor keeps means over rows and columns, which shard: true cuts "
                "into parts; use optimizer: adamw, or shard: false"
            )
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(
                f"decay_steps belongs to schedule wsd, and schedule is {self.schedule}; "
                "leave it out, or set schedule: wsd"
            )
        return self

    @model_validator(mode="after")
    def _belongs_to_shards(self) -> Self:
        if self.mesh is not None and not self.shard:
            raise ValueError("train.mesh says how shards stand; set train.shard=true as well")
        if self.reduce_dtype is not None and not self.shard:
            raise ValueError(
                f"reduce_dtype {self.reduce_dtype} is how shards' gradients are summed; set "
                "train.shard=true as well, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _state_can_be_offloaded(self) -> Self:
        reasons = {
            "sgd": "keeps no state",
            "adamw_8bit": "keeps its state where its own kernels need it",
        }
        if self.offload and self.optimizer in reasons:
            raise ValueError(
                f"offload moves the optimiser's state, and optimizer {self.optimizer} "
                f"{reasons[self.optimizer]}; leave offload out, or use optimizer: adamw"
            )
        return self

    @model_validator(mode="after")
    def _goal_is_known(self) -> Self:
        """Nobody guesses the direction of a metric: a wrong guess would keep the worst checkpoint."""
        if self.metric != "auto" and self.metric_goal == "auto" and not known_goal(self.metric):
            raise ValueError(
                f"it is not known whether less or more of metric `{self.metric}` is better; "
                "set train.metric_goal to min or max"
            )
        return self

    def goal_of(self, metric: str) -> Goal:
        """Whether less or more of `metric`, this section's or the one
        that `auto` stood for, is better.
        """
        if self.metric_goal != "auto":
            return self.metric_goal
        goal = known_goal(metric)
        assert goal is not None  # refused when the section was read
        return goal
