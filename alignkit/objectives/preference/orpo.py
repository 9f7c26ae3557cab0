"""ORPO: likelihood of the chosen response plus the odds ratio of the two, without a reference."""

import math
from typing import ClassVar

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.batches import LossTerms, PairBatch, Plan
from alignkit.objectives.base import PairObjective
from alignkit.tensors import check_same_shape, masked_mean

# mean log-prob from which on the odds count as those of this log-prob; their slope there is 1e6
CERTAIN = -1e-6


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p <= 0: [...] -> [...].

    Above -1e-6 its tangent, so that certainty stays finite.
    """
    inside = logps.clamp(max=CERTAIN)
    near = inside > -math.log(2)
    small = torch.where(near, inside, -1.0)
    large = torch.where(near, -1.0, inside)
    log1mexp = torch.where(near, (-torch.expm1(small)).log(), torch.log1p(-large.exp()))
    return inside - log1mexp + (logps - inside) / -CERTAIN


def orpo_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, *, odds_weight: float
) -> Tensor:
    """-a_w - odds_weight * log sigmoid(log odds(a_w) - log odds(a_l)) per pair from MEAN token
    log-probs a: [B] x 2 -> [B].

    Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7.
    """
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps
    )
    wide = torch.promote_types(policy_chosen_logps.dtype, torch.float32)
    chosen = policy_chosen_logps.to(wide)
    rejected = policy_rejected_logps.to(wide)
    return -chosen - odds_weight * logsigmoid(log_odds(chosen) - log_odds(rejected))


class ORPO(PairObjective):
    """Odds ratio preference optimisation (Hong et al. 2024, arXiv:2403.07691). Fine-tunes and
    aligns in one run.
    """

    paper: ClassVar[str] = "Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7"
    equation: ClassVar[str] = (
        "L = -a(w) - lambda log sigmoid(logit e^a(w) - logit e^a(l)), a = log pi(y)/|y|"
    )

    odds_weight: NonNegativeFloat = Field(
        0.1, description="lambda, weight of the odds ratio beside the likelihood"
    )

    @property
    def plan(self) -> Plan:
        return Plan("pair", anchors=())

    def loss(self, batch: PairBatch) -> LossTerms:
        chosen, rejected = (
            masked_mean(tokens.policy, tokens.mask) for tokens in (batch.chosen, batch.rejected)
        )
        losses = orpo_loss(chosen, rejected, odds_weight=self.odds_weight)
        terms = batch.rows(
            "orpo", losses, rewards=(self.odds_weight * chosen, self.odds_weight * rejected)
        )
        odds = (log_odds(chosen.float()) - log_odds(rejected.float())).detach()
        return terms + LossTerms([], {"log_odds_ratio": odds})
