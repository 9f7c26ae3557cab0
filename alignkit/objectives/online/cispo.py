"""CISPO: the importance weight is clipped, not the token: every token keeps a gradient."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from alignkit.batches import LossTerms, Plan, RolloutBatch
from alignkit.kl import clamp_log_ratio
from alignkit.objectives.base import Objective
from alignkit.objectives.ratios import RatioGroup
from alignkit.objectives.rollout_base import ClipWidth, ratio_metrics
from alignkit.objectives.surrogates import shared_mean
from alignkit.tensors import check_same_shape


def cispo_loss(
    policy_logps: Tensor,
    behavior_logps: Tensor,
    advantages: Tensor,
    *,
    clip_low: float | None = None,
    clip_high: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """-clip(w, 1 - clip_low, 1 + clip_high) A log pi, the weight without gradient, per token: [...]
    x 3 -> [...].

    None switches a bound off. With a `mask` [N, T] w is the geometric mean over the tokens of a
    completion. MiniMax-M1 2025, arXiv:2506.13585, eq. 4 and 5.
    """
    check_same_shape(
        policy_logps=policy_logps, behavior_logps=behavior_logps, advantages=advantages
    )
    low = -torch.inf if clip_low is None else 1 - clip_low
    high = torch.inf if clip_high is None else 1 + clip_high
    log_importance = policy_logps - behavior_logps
    if mask is not None:
        log_importance = shared_mean(log_importance, mask)
    weight = clamp_log_ratio(log_importance).exp().clamp(low, high)
    return -(weight * advantages).detach() * policy_logps


class CISPO(RatioGroup):
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
            cls(ratio="sequence", clip_high=0.5),
        ]

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        logps = tokens.policy
        old = tokens.get("behavior")
        advantages, masked = self.teaching_advantages(batch)
        values = cispo_loss(logps, old, advantages, mask=self.ratio_mask(tokens), **self.clip)

        # The clip takes no gradient away here: TRL's name for where it holds a weight down.
        ratio, advantages = self.ratios(batch)
        metrics = {**ratio_metrics(tokens, ratio), **masked}
        if self.clip_high is not None:
            held = (ratio > 1 + self.clip_high) & (advantages > 0)
            if held.dim() == 2:
                held = held[tokens.mask]
            metrics["cispo_clip_ratio"] = held.to(ratio.dtype)
        return LossTerms([self.term("cispo", values, tokens), *self.entropy_terms(tokens)], metrics)
