"""LD-DPO: DPO in which tokens beyond the shorter response's length count less."""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import LossTerms, PairBatch, TokenLogps
from alignkit.objectives.base import Objective, PairObjective
from alignkit.objectives.preference.dpo import DPO, dpo_loss
from alignkit.tensors import check_same_shape, masked_sum


def length_desensitised(
    logps: Tensor, mask: Tensor, shared_lengths: Tensor, *, alpha: float
) -> Tensor:
    """Sum of the first `shared_lengths` trained tokens' log-probs plus alpha times that of the
    others: [B, T] x 2, [B] -> [B].

    Liu et al. 2024, arXiv:2409.06411.
    """
    check_same_shape(logps=logps, mask=mask)
    shared = mask & (mask.cumsum(-1) <= shared_lengths.unsqueeze(-1))
    return masked_sum(torch.where(shared, logps, alpha * logps), mask)


class LDDPO(PairObjective):
    """Length-desensitised DPO (Liu et al. 2024, arXiv:2409.06411): `alpha` between truncation (0)
    and DPO (1).
    """

    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2409.06411"
    equation: ClassVar[str] = (
        "DPO on sum_{t <= m} log pi(y_t) + alpha sum_{t > m} log pi(y_t), m = min(|w|, |l|)"
    )

    beta: PositiveFloat = Field(0.1, description="strength of the reverse KL to the reference")
    alpha: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="weight of tokens beyond the shorter response's length"
    )
    applies_to: Literal["both", "policy"] = Field(
        "both",
        description="policy: the reference's log-probs stay whole, as in early implementations",
    )

    def loss(self, batch: PairBatch) -> LossTerms:
        shared = torch.minimum(batch.chosen.lengths, batch.rejected.lengths)

        def weighed(tokens: TokenLogps, name: str) -> Tensor:
            alpha = self.alpha if name == "policy" or self.applies_to == "both" else 1.0
            return length_desensitised(tokens.get(name), tokens.mask, shared, alpha=alpha)

        pc, pr, rc, rr = (
            weighed(t, name)
            for name in ("policy", "reference")
            for t in (batch.chosen, batch.rejected)
        )
        losses = dpo_loss(pc, pr, rc, rr, beta=self.beta)
        return batch.rows("lddpo", losses, rewards=(self.beta * (pc - rc), self.beta * (pr - rr)))

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """DPO's, ref * exp(reward / beta), where all responses have one length."""
        return DPO(beta=self.beta).optimum(reward, reference)

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(alpha=0.2, applies_to="policy")]

    @classmethod
    def limits(cls) -> Sequence[tuple[Objective, Objective]]:
        return [(cls(alpha=1.0), DPO()), (cls(alpha=1.0, applies_to="policy"), DPO())]
