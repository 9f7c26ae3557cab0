"""VESPO: policy gradients weighted by a smooth function of the whole completion's importance."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import LossTerms, Plan, RolloutBatch
from alignkit.kl import importance
from alignkit.objectives.base import Objective
from alignkit.objectives.exploration import ExploringGroup
from alignkit.objectives.rollout_base import advantages_of, ratio_metrics, unspread
from alignkit.tensors import masked_sum

# Log-ratios are clamped here, before exp() overflows or the logarithm of a weight of 0 is taken.
TOKEN_LIMIT = 20.0
SMALLEST_WEIGHT = 1e-8


def gamma_weights(log_ratio: Tensor, power: Tensor, decay: Tensor) -> Tensor:
    """w^power * exp(decay (1 - w)) with w = exp(log_ratio): [N] x 3 -> [N], without gradient; 1 at
    w = 1.
    """
    lowest = torch.tensor(SMALLEST_WEIGHT, dtype=torch.float64).log().item()
    log_ratio = log_ratio.detach().clamp(lowest, TOKEN_LIMIT)
    return (decay + power * log_ratio - decay * log_ratio.exp()).exp()


class VESPO(ExploringGroup):
    """Variational sequence-level soft policy optimisation (2026, arXiv:2602.10693, section 3.4). w
    is the importance of the whole completion, not its mean per token.
    """

    paper: ClassVar[str] = "VESPO 2026, arXiv:2602.10693, section 3.4"
    equation: ClassVar[str] = (
        "L = -w^k exp(lambda (1 - w)) A log pi per token, the weight without gradient; w = (pi/pi_old)(y)"
    )

    clip_low: None = Field(None, description="always null: the weight takes the clip's place")
    clip_high: None = Field(None, description="always null: the weight takes the clip's place")
    power_positive: PositiveFloat = Field(2.0, description="k where the advantage is not negative")
    decay_positive: PositiveFloat = Field(
        3.0, description="lambda where the advantage is not negative"
    )
    power_negative: PositiveFloat = Field(3.0, description="k where the advantage is negative")
    decay_negative: PositiveFloat = Field(2.0, description="lambda where the advantage is negative")

    @property
    def plan(self) -> Plan:
        return self.exploring_plan()

    @property
    def surrogate(self) -> bool:
        return True

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(power_positive=1.0, decay_negative=1.0, scale_by_std=False)]

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        old = tokens.get("behavior")
        advantages, masked = self.teaching_advantages(batch)

        better = unspread(advantages_of(batch), tokens) >= 0
        power = torch.where(better, self.power_positive, self.power_negative)
        decay = torch.where(better, self.decay_positive, self.decay_negative)
        log_ratio = (tokens.policy - old).clamp(-TOKEN_LIMIT, TOKEN_LIMIT)
        weights = gamma_weights(masked_sum(log_ratio, tokens.mask), power, decay)

        values = -weights.unsqueeze(-1) * advantages * tokens.policy
        metrics = {**ratio_metrics(tokens, importance(tokens.policy, old)), **masked}
        metrics["vespo/phi_seq_mean"] = weights  # TRL's name
        return LossTerms([self.term("vespo", values, tokens), *self.entropy_terms(tokens)], metrics)
