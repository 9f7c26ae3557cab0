"""The optimiser and the learning-rate schedule that a recipe's `train` section describes."""

import math
from collections.abc import Sequence

import torch

from alignkit.config.train import TrainConfig


def make_optimizer(
    config: TrainConfig, parameters: Sequence[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW or SGD over `parameters`."""
    # Weight decay pulls matrices towards zero and leaves vectors (norms and biases) alone.
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]

    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.adam_betas, fused=True)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (counted from 0) of `steps`.

    It rises linearly over the warm-up. After that it is constant, or falls to 0 at the end of the
    last step along a line or a cosine.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps

    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule == "linear":
        return config.learning_rate * (1 - progress)
    if config.schedule == "cosine":
        return config.learning_rate * (0.5 * (1 + math.cos(math.pi * progress)))
    return config.learning_rate
