"""SamPO: DPO on equally many tokens of both responses, drawn
at random, so that length carries no reward.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import LossTerms, PairBatch, Plan, TokenLogps
from alignkit.objectives.base import PairObjective
from alignkit.objectives.preference.dpo import DPO, dpo_loss
from alignkit.tensors import check_same_shape, masked_sum

BITS = 0x7FFFFFFF


def mix(x: Tensor) -> Tensor:
    """A pseudo-random integer below 2^31 for each non-negative
    integer below 2^31: int64 [...] -> [...].
    """
    for multiplier in (0x45D9F3B, 0x119DE1F3):
        x = ((x ^ (x >> 16)) * multiplier) & BITS
    return x ^ (x >> 16)


def drawn(labels: Tensor, mask: Tensor, count: Tensor, *, seed: int) -> Tensor:
    """`count` [B] of each row's trained positions, uniformly without replacement: [B, T] x 2, [B]
    -> bool [B, T].

    The draw is a function of (seed, the row's token ids), so that neither padding, order nor
    micro-batches change it.
    """
    check_same_shape(labels=labels, mask=mask)
    place = mix((mix(labels.long() + 1) + mask.cumsum(-1)) & BITS)
    row = masked_sum(place, mask).unsqueeze(-1) & BITS
    keys = torch.where(
        mask,
        mix(mix((place ^ row) & BITS) ^ mix(torch.tensor(seed & BITS, device=labels.device))),
        BITS + 1,
    )
    rank = keys.sort(dim=-1, stable=True).indices.argsort(-1)
    return mask & (rank < count.unsqueeze(-1))


def token_ids(policy_logprobs: Tensor, reference_logprobs: Tensor | None, labels: Tensor) -> Tensor:
    """The plan's statistic: which token stands at each position,
    [C, V] x 2, [C] -> [C]; exact below 2^24.
    """
    return labels.to(policy_logprobs.dtype)


class SamPO(PairObjective):
    """SamPO (Lu et al. 2024, arXiv:2406.10957). Policy and reference see the same positions, as in
    the paper (its code draws them apart); a row keeps its draw through all epochs of a seed.
    """

    paper: ClassVar[str] = "Lu et al. 2024, arXiv:2406.10957"
    equation: ClassVar[str] = (
        "DPO on sums over min(|w|, |l|) positions of each response, drawn without replacement"
    )

    beta: PositiveFloat = Field(0.1, description="strength of the reverse KL to the reference")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of the draw of positions")

    @property
    def plan(self) -> Plan:
        return Plan("pair", statistics={"token_ids": token_ids})

    def loss(self, batch: PairBatch) -> LossTerms:
        count = torch.minimum(batch.chosen.lengths, batch.rejected.lengths)

        def kept(tokens: TokenLogps, name: str) -> Tensor:
            chosen = drawn(tokens.get("token_ids").detach(), tokens.mask, count, seed=self.seed)
            return masked_sum(tokens.get(name), chosen)

        pc, pr, rc, rr = (
            kept(t, name)
            for name in ("policy", "reference")
            for t in (batch.chosen, batch.rejected)
        )
        losses = dpo_loss(pc, pr, rc, rr, beta=self.beta)
        return batch.rows("sampo", losses, rewards=(self.beta * (pc - rc), self.beta * (pr - rr)))

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """DPO's, ref * exp(reward / beta), where all responses have one length."""
        return DPO(beta=self.beta).optimum(reward, reference)
