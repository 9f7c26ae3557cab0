"""WPO: pairs that the policy itself would write weigh more than pairs that are far from it."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from alignkit.batches import PairBatch, Plan
from alignkit.objectives.base import PairObjective
from alignkit.tensors import check_same_shape, masked_mean

COLLISION = "log_collision"


def log_collision(
    policy_logprobs: Tensor, anchor_logprobs: Tensor | None, labels: Tensor
) -> Tensor:
    """The plan's statistic log sum_v p(v)^2, the log of the probability that two draws of a token
    agree, without gradient: [C, V], unused, [C] -> [C].
    """
    return (2 * policy_logprobs.detach()).logsumexp(-1)


def wpo_weights(policy_logps: Tensor, log_collisions: Tensor, mask: Tensor) -> Tensor:
    """The weight of each completion, [N, T] x 3 -> [N], without gradient: exp of the mean over its
    tokens of log p(y_t) - log sum_v p(v)^2. A completion that the policy is as likely to draw as
    its own samples weighs about 1.

    Zhou et al. 2024, arXiv:2406.11827, eq. 2, with the alignment of its "sampled" form.
    """
    check_same_shape(policy_logps=policy_logps, log_collisions=log_collisions, mask=mask)
    return masked_mean(policy_logps.detach() - log_collisions.detach(), mask).exp()


class WeighablePairs(PairObjective):
    """A loss on pairs in which each pair may weigh as much as the policy would write it."""

    weighting: Literal["none", "wpo"] = Field(
        "none", description="wpo: a pair weighs as much as both responses are like the policy's own"
    )

    @property
    def plan(self) -> Plan:
        return self.pair_plan()

    def pair_plan(self, *, anchors: tuple[str, ...] = ("reference",)) -> Plan:
        """Pairs under these anchors, with what the weighting reads of the policy."""
        if self.weighting == "none":
            return Plan("pair", anchors=anchors)
        return Plan(
            "pair",
            statistics={COLLISION: log_collision},
            without_anchor=(COLLISION,),
            anchors=anchors,
        )

    @property
    def surrogate(self) -> bool:
        return self.weighting != "none"

    @property
    def surrogate_statistics(self) -> tuple[str, ...]:
        return (COLLISION,)

    def weighted(self, losses: Tensor, batch: PairBatch) -> Tensor:
        """The losses of the pairs [B], each times the weights of its two responses."""
        if self.weighting == "none":
            return losses
        weights = [
            wpo_weights(tokens.policy, tokens.extras[COLLISION], tokens.mask)
            for tokens in (batch.chosen, batch.rejected)
        ]
        return losses * torch.stack(weights).prod(0).to(losses.dtype)
