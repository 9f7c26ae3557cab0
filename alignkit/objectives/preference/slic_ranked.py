"""SLiC calibration: candidates of a prompt are to be as likely as they are good, by a margin each."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from alignkit.batches import LossTerms, Plan, RankedBatch, Term
from alignkit.objectives.base import Objective
from alignkit.tensors import check_same_shape


def slic_ranked_loss(policy_logps: Tensor, mask: Tensor, *, delta: float, by_rank: bool) -> Tensor:
    """Mean over i < j of max(0, d - log pi_i + log pi_j), log-prob sums of K candidates, the best
    first and those that there are in front: [B, K] x 2 -> [B]; 0 for a candidate alone.

    d is `delta`, or `delta` (j - i) with `by_rank`. Source: Zhao et al. 2022, arXiv:2210.00045.
    """
    check_same_shape(policy_logps=policy_logps, mask=mask)
    places = torch.arange(mask.shape[-1], device=mask.device)
    further = (places - places.unsqueeze(-1)).to(policy_logps.dtype)  # [i, j]: j - i
    margins = delta * (further if by_rank else torch.ones_like(further))

    ordered = (mask.unsqueeze(-1) & mask.unsqueeze(-2)).triu(1)
    short = (margins - policy_logps.unsqueeze(-1) + policy_logps.unsqueeze(-2)).relu()
    total = torch.where(ordered, short, 0.0).sum((-1, -2))
    return total / ordered.sum((-1, -2)).clamp(min=1)


class SLiCRanked(Objective):
    """Sequence likelihood calibration (Zhao et al. 2022, arXiv:2210.00045) on rankings.

    On pairs it is SLiC-HF. Nothing but the best candidate's likelihood anchors the policy.
    """

    paper: ClassVar[str] = "Zhao et al. 2022, arXiv:2210.00045"
    equation: ClassVar[str] = (
        "L = mean_{i<j} max(0, d - log pi(y_i) + log pi(y_j)) - sft_weight * log pi(y_1), "
        "d = delta or delta (j - i)"
    )

    delta: PositiveFloat = Field(1.0, description="margin in nats between two candidates")
    form: Literal["rank", "list"] = Field(
        "rank", description="list: the margin grows with the distance of the two in the ranking"
    )
    sft_weight: NonNegativeFloat = Field(
        0.1, description="weight of the best candidate's likelihood"
    )

    @property
    def plan(self) -> Plan:
        return Plan("ranked", anchors=())

    def loss(self, batch: RankedBatch) -> LossTerms:
        logps, mask = batch.ranked(batch.tokens.sequence())
        losses = slic_ranked_loss(logps, mask, delta=self.delta, by_rank=self.form == "list")

        gaps = (logps.unsqueeze(-1) - logps.unsqueeze(-2)).detach()
        pairs = gaps[(mask.unsqueeze(-1) & mask.unsqueeze(-2)).triu(1)]
        metrics = {
            "rewards/margins": pairs,
            "rewards/accuracies": (pairs > 0).to(pairs.dtype),
            "logps/chosen": logps[:, 0].detach(),
        }
        return LossTerms([Term("slic_ranked", losses - self.sft_weight * logps[:, 0])], metrics)

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(form="list", delta=0.5, sft_weight=0.3)]
