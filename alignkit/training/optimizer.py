"""The optimiser and the learning-rate schedule that a recipe's `train` section describes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from alignkit.config.train import TrainConfig
from alignkit.errors import ConfigError
from alignkit.training.offload import Offloaded

Groups = list[dict[str, Any]]


def make_optimizer(
    config: TrainConfig, parameters: Sequence[nn.Parameter], module: nn.Module | None = None
) -> torch.optim.Optimizer:
    """The optimiser that `train.optimizer` names, over `parameters`; with `train.offload`, its state
    waits in the CPU's memory. Muon asks `module`, which they belong to, which of them are embeddings
    or the head. ConfigError where there is nothing for Muon.
    """
    rule = _rule(config, parameters, module)
    return Offloaded(rule) if config.offload else rule


def _rule(
    config: TrainConfig, parameters: Sequence[nn.Parameter], module: nn.Module | None
) -> torch.optim.Optimizer:
    # Weight decay pulls matrices towards zero and leaves vectors (norms and biases) alone.
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]

    rate = config.learning_rate
    adam: dict[str, Any] = {"lr": rate, "betas": config.adam_betas}
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate)
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=rate)
    if config.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]

        return AdamW8bit(groups, **adam)  # type: ignore[no-any-return]
    if config.optimizer == "muon":
        return MuonWithAdamW(groups, outer_weights(module), **adam)
    return torch.optim.AdamW(groups, fused=True, **adam)


def outer_weights(module: nn.Module | None) -> set[int]:
    """Ids of the weights by which tokens enter and leave a model: embeddings and the head."""
    if module is None:
        return set()
    outer = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    for model in module.modules():
        head = getattr(model, "get_output_embeddings", lambda: None)()
        outer += [head] if head is not None else []
    return {id(p) for m in outer for p in m.parameters()}


class MuonWithAdamW(torch.optim.Optimizer):
    """torch's Muon on the matrices inside a model, and AdamW on the other parameters, as one
    optimiser. Muon's steps are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982),
    so that one learning rate serves both.

    `outer` holds the ids of matrices that AdamW takes too (embeddings and head).
    """

    def __init__(
        self, groups: Groups, outer: set[int], *, lr: float, betas: tuple[float, float]
    ) -> None:
        inner = {id(p) for g in groups for p in g["params"] if p.dim() == 2} - outer
        if not inner:
            raise ConfigError(
                "train.optimizer: muon moves the matrices inside a model, and none of them is "
                "trained here; use adamw"
            )
        parts: Groups = []
        for group in groups:
            sides = {
                "muon": [p for p in group["params"] if id(p) in inner],
                "adamw": [p for p in group["params"] if id(p) not in inner],
            }
            parts += [{**group, "params": ps, "rule": name} for name, ps in sides.items() if ps]

        # Each rule writes its own settings into its groups, which are this optimiser's too.
        muon = [group for group in parts if group["rule"] == "muon"]
        rest = [group for group in parts if group["rule"] == "adamw"]
        self.rules: dict[str, torch.optim.Optimizer] = {
            "muon": torch.optim.Muon(muon, lr=lr, adjust_lr_fn="match_rms_adamw")
        }
        if rest:
            self.rules["adamw"] = torch.optim.AdamW(rest, lr=lr, betas=betas, fused=True)
        super().__init__([g for rule in self.rules.values() for g in rule.param_groups], {})
        self._share()

    def _share(self) -> None:
        """One state and one set of groups, seen by this optimiser and by its rules."""
        for name, rule in self.rules.items():
            rule.state = self.state
            rule.param_groups = [g for g in self.param_groups if g["rule"] == name]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both rules."""
        assert closure is None, "the loop computes gradients itself"
        for rule in self.rules.values():
            rule.step()
        return None

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Put back what `state_dict` gave."""
        super().load_state_dict(dict(state_dict))
        self._share()


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (counted from 0) of `steps`.

    It rises linearly over the warm-up. After that it is constant, or falls as `decay` says, from
    `train.learning_rate` to `train.learning_rate_floor` times that.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    floor = 0.0 if config.schedule == "constant" else config.learning_rate_floor
    return config.learning_rate * (floor + (1 - floor) * decay(config, step, steps))


def decay(config: TrainConfig, step: int, steps: int) -> float:
    """What is left at `step` of the way from the peak to the floor, in [0, 1]; 1 at the end of the
    warm-up. The formulas are those of transformers' schedules of the same names.
    """
    since = step - config.warmup_steps
    progress = since / max(1, steps - config.warmup_steps)
    if config.schedule == "linear":
        return 1 - progress
    if config.schedule == "cosine":
        return _half_cosine(progress)
    if config.schedule == "inverse_sqrt":
        return (1 + since / (config.warmup_steps or 10_000)) ** -0.5
    if config.schedule == "wsd":  # warm-up, stable, decay
        falling = min(decay_steps(config, steps), max(1, steps - config.warmup_steps))
        return _half_cosine(max(0.0, (step - (steps - falling)) / falling))
    return 1.0


def decay_steps(config: TrainConfig, steps: int) -> int:
    """Steps over which schedule wsd falls: `train.decay_steps`, or a tenth of all."""
    return config.decay_steps or max(1, steps // 10)


def _half_cosine(progress: float) -> float:
    """From 1 at 0 to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * progress))
