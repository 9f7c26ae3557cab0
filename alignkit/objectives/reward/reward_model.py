"""Reward models: Bradley-Terry on pairs, Plackett-Luce on rankings of any length."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from alignkit.batches import LossTerms, Plan, ScoredBatch, Term
from alignkit.errors import ShapeError
from alignkit.objectives.base import Objective
from alignkit.tensors import check_same_shape


def plackett_luce_loss(rewards: Tensor, mask: Tensor) -> Tensor:
    """-log P(ranking): rewards and mask [B, K], best first, the
    ranked ones True and in front: -> [B].

    The best of those that are left is drawn again and again with probability softmax(rewards); for
    K = 2 that is Bradley-Terry. Plackett 1975; Luce 1959; for reward models Ouyang et al. 2022,
    arXiv:2203.02155 (its K-wise loss compares pairs).

    >>> plackett_luce_loss(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)).exp()  # 3! orders, all alike
    tensor([6.0000])
    """
    check_same_shape(rewards=rewards, mask=mask)
    if rewards.dim() != 2:
        raise ShapeError(
            f"plackett_luce_loss: rewards are {list(rewards.shape)}; they must be [B, K], best first"
        )
    lowest = torch.finfo(rewards.dtype).min
    left = torch.where(mask, rewards, lowest).flip(-1).logcumsumexp(-1).flip(-1)
    return torch.where(mask, left - rewards, 0.0).sum(-1)


class PlackettLuce(Objective):
    """Likelihood of rankings under one reward per completion; of pairs it is Bradley-Terry. Trains
    a model with one output.
    """

    paper: ClassVar[str] = (
        "Bradley and Terry 1952; Plackett 1975; Stiennon et al. 2020, arXiv:2009.01325"
    )
    equation: ClassVar[str] = (
        "L = sum_k [log sum_{j >= k} exp r(y_j) - r(y_k)], completions best first"
    )

    centre: NonNegativeFloat = Field(
        0.0,
        description="weight of the mean reward's square: fixes the constant left open; for pairs 4 "
        "times TRL's center_rewards_coefficient",
    )

    @property
    def plan(self) -> Plan:
        return Plan("ranked", anchors=(), outputs=1)

    def log_odds(self, first: Tensor, second: Tensor) -> Tensor:
        """log P/(1 - P) that the first beats the second, from their outputs [B, 1] each: -> [B]."""
        return (first - second)[:, 0]

    def loss(self, batch: ScoredBatch) -> LossTerms:
        rewards, mask = batch.ranked(batch.outputs[:, 0])

        # A margin is what the better completion of a pair still owes.
        behind = torch.zeros_like(rewards)
        if batch.margins is not None:
            behind[:, 1] = batch.margins
        values = plackett_luce_loss(rewards + behind, mask)
        mean = torch.where(mask, rewards, 0.0).sum(-1) / mask.sum(-1)

        # above the diagonal: by how much the better completion leads the worse one
        gaps = (rewards.unsqueeze(-1) - rewards.unsqueeze(-2)).detach()
        pairs = (mask.unsqueeze(-1) & mask.unsqueeze(-2)).triu(1)
        metrics = {
            "rewards/mean": rewards.detach()[mask],
            "rewards/margins": gaps[pairs],
            "rewards/accuracies": (gaps[pairs] > 0).to(gaps.dtype),
        }
        return LossTerms([Term("reward_model", values + self.centre * mean**2)], metrics)

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(centre=0.1)]
