"""SAPO: a smooth gate where GRPO clips, narrower for tokens that should become less likely."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import LossTerms, Plan, RolloutBatch
from alignkit.kl import importance
from alignkit.objectives.base import Objective
from alignkit.objectives.exploration import ExploringGroup
from alignkit.objectives.rollout_base import Aggregation, ratio_metrics
from alignkit.tensors import check_same_shape


def sapo_loss(
    policy_logps: Tensor,
    behavior_logps: Tensor,
    advantages: Tensor,
    *,
    temperature_positive: float = 1.0,
    temperature_negative: float = 1.05,
) -> Tensor:
    """-4 / tau * sigmoid(tau (w - 1)) * A per token: [...] x 3 -> [...], with `temperature_positive`
    as tau where A > 0 and `temperature_negative` elsewhere.

    At w = 1 the gradient is that of -w A. Gao et al. 2025, arXiv:2511.20347.
    """
    check_same_shape(
        policy_logps=policy_logps, behavior_logps=behavior_logps, advantages=advantages
    )
    temperature = torch.where(advantages > 0, temperature_positive, temperature_negative)
    ratio = importance(policy_logps, behavior_logps.detach())
    gate = (temperature * (ratio - 1)).sigmoid()
    return -4 / temperature * gate * advantages


class SAPO(ExploringGroup):
    """Soft adaptive policy optimisation (Gao et al. 2025, arXiv:2511.20347). A token far from the
    policy that sampled it loses weight gradually.
    """

    paper: ClassVar[str] = "Gao et al. 2025, arXiv:2511.20347"
    equation: ClassVar[str] = (
        "L = -4/tau sigmoid(tau (w - 1)) A per token; A = (score - group mean) / group std"
    )

    clip_low: None = Field(None, description="always null: the gate takes the clip's place")
    clip_high: None = Field(None, description="always null: the gate takes the clip's place")
    temperature_positive: PositiveFloat = Field(
        1.0, description="how sharply the gate closes where the advantage is positive"
    )
    temperature_negative: PositiveFloat = Field(
        1.05, description="how sharply it closes where the advantage is negative"
    )
    aggregation: Aggregation = Field("sequence_mean", description="as published")

    @property
    def plan(self) -> Plan:
        return self.exploring_plan()

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(temperature_positive=2.0, temperature_negative=3.0, scale_by_std=False)]

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        old = tokens.get("behavior")
        advantages, masked = self.teaching_advantages(batch)
        values = sapo_loss(
            tokens.policy,
            old,
            advantages,
            temperature_positive=self.temperature_positive,
            temperature_negative=self.temperature_negative,
        )
        metrics = {**ratio_metrics(tokens, importance(tokens.policy, old)), **masked}
        return LossTerms([self.term("sapo", values, tokens), *self.entropy_terms(tokens)], metrics)
