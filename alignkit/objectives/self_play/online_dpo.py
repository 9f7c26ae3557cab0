"""Online DPO: DPO on two fresh samples of the policy."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import Draw, GameBatch, LossTerms, Plan, Term
from alignkit.objectives.base import Objective
from alignkit.objectives.preference.dpo import dpo_loss


class OnlineDPO(Objective):
    """Direct alignment from online feedback (Guo et al. 2024, arXiv:2402.04792); both orders count,
    with their probabilities.

    For a judge that is a Bradley-Terry model of a reward it ends at the closed-form optimum of that
    reward. For other judges the logistic loss does not end at the equilibrium of the game: take
    `online_ipo` or `egpo`.
    """

    paper: ClassVar[str] = "Guo et al. 2024, arXiv:2402.04792"
    equation: ClassVar[str] = (
        "L = -p log sigmoid(beta h) - (1 - p) log sigmoid(-beta h), h = log pi/ref(y) - log pi/ref(y'), p = P(y > y')"
    )

    own: ClassVar[int] = 2  # how many of the two samples are the policy's

    beta: PositiveFloat = Field(
        0.1, description="strength of the KL to the reference, per completion"
    )

    @property
    def plan(self) -> Plan:
        return Plan("game", samples=(Draw(2),), feedback="pairwise")

    def pair_losses(self, batch: GameBatch) -> Tensor:
        """Expected DPO loss over the judge's label [B]."""
        first, second = batch.completions
        policy, reference = (
            (first.sequence(name), second.sequence(name)) for name in ("policy", "reference")
        )
        p = batch.preference[:, 0]
        wins = dpo_loss(*policy, *reference, beta=self.beta)
        loses = dpo_loss(*policy[::-1], *reference[::-1], beta=self.beta)
        return p * wins + (1 - p) * loses

    def loss(self, batch: GameBatch) -> LossTerms:
        ratios = [
            (tokens.sequence() - tokens.sequence("reference")).detach()
            for tokens in batch.completions
        ]
        metrics = {
            "rewards/margins": self.beta * (ratios[0] - ratios[1]),
            "rewards/probabilities": batch.preference[:, 0],
            "kl": torch.stack(ratios[: self.own]).mean(0),
        }
        return LossTerms([Term("online_dpo", self.pair_losses(batch))], metrics)
