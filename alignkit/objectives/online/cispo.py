"""CISPO: the importance weight is clipped, not the token: every token keeps a gradient."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from alignkit.batches import LossTerms, Plan, RolloutBatch
from alignkit.kl import importance
from alignkit.objectives.base import Objective
from alignkit.objectives.exploration import ExploringGroup
from alignkit.objectives.rollout_base import ClipWidth, advantages_of, ratio_metrics
from alignkit.tensors import check_same_shape


def cispo_loss(
    policy_logps: Tensor,
    behavior_logps: Tensor,
    advantages: Tensor,
    *,
    clip_low: float | None = None,
    clip_high: float | None = None,
) -> Tensor:
    """-clip(w, 1 - clip_low, 1 + clip_high) A log pi, the weight without gradient, per token: [...]
    x 3 -> [...].

    None switches a bound off. MiniMax-M1 2025, arXiv:2506.13585, eq. 4 and 5.
    """
    check_same_shape(
        policy_logps=policy_logps, behavior_logps=behavior_logps, advantages=advantages
    )
    low = -torch.inf if clip_low is None else 1 - clip_low
    high = torch.inf if clip_high is None else 1 + clip_high
    weight = importance(policy_logps, behavior_logps).clamp(low, high)
    return -(weight * advantages).detach() * policy_logps


class CISPO(ExploringGroup):
    """CISPO (MiniMax-M1 2025, arXiv:2506.13585). Bounds are distances from 1, as elsewhere here."""

    paper: ClassVar[str] = "MiniMax-M1 2025, arXiv:2506.13585, eq. 4 and 5"
    equation: ClassVar[str] = (
        "L = -clip(w) A log pi per token, the weight without gradient; A = (score - mean) / std"
    )

    clip_low: ClipWidth | None = Field(
        None, description="the weight is at least 1 - this; null = off, as published"
    )
    clip_high: ClipWidth | None = Field(
        2.0, description="the weight is at most 1 + this; null = off"
    )

    @property
    def plan(self) -> Plan:
        return self.exploring_plan()

    @property
    def surrogate(self) -> bool:
        return True

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [
            cls(),
            cls(clip_low=0.2, clip_high=0.28, scale_by_std=False, aggregation="constant", length=4),
        ]

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        logps = tokens.policy
        old = tokens.get("behavior")
        advantages, masked = self.teaching_advantages(batch)
        values = cispo_loss(logps, old, advantages, **self.clip)

        # The clip takes no gradient away here: TRL's name for where it holds a weight down.
        ratio = importance(logps, old)
        metrics = {**ratio_metrics(tokens, ratio), **masked}
        if self.clip_high is not None:
            held = (ratio > 1 + self.clip_high) & (advantages_of(batch) > 0)
            metrics["cispo_clip_ratio"] = held[tokens.mask].to(ratio.dtype)
        return LossTerms([self.term("cispo", values, tokens), *self.entropy_terms(tokens)], metrics)
