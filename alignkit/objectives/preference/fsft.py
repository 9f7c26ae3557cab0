"""f-divergence fine-tuning: matching demonstrations under other divergences than the forward KL
that likelihood minimises.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from alignkit import divergences
from alignkit.batches import LossTerms, PairBatch
from alignkit.divergences import LIMIT, Divergence
from alignkit.objectives.base import Objective, PairObjective
from alignkit.tensors import pair_log_ratios


def fsft_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    divergence: str | Divergence,
) -> Tensor:
    """-f'(u) at the demonstration + (u f'(u) - f(u)) at a sample of the reference, u = pi/ref: [B]
    x 4 -> [B].

    Chosen: the demonstration; rejected: drawn from the reference. ConfigError for an unknown
    divergence. The mean over both is minimal where the policy is the demonstrator, for every f.
    Wang et al. 2025, arXiv:2507.00018.
    """
    chosen, sampled = pair_log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    if isinstance(divergence, str):
        divergence = divergences.get(divergence)
    slope = divergence.f_prime(sampled)
    u = sampled.clamp(-LIMIT, LIMIT).exp()
    value = u * slope - divergence.f(sampled)
    # The derivative of u f' - f is u df'. Autograd of the difference would cancel two large terms
    # and lose it.
    carrier = u.detach() * slope
    return -divergence.f_prime(chosen) + carrier + (value - carrier).detach()


class FSFT(PairObjective):
    """Supervised fine-tuning under an f-divergence (Wang et al. 2025, arXiv:2507.00018; derived
    anew). Give pairs of a demonstration (chosen) and a sample of the reference (rejected).
    """

    paper: ClassVar[str] = "Wang et al. 2025, arXiv:2507.00018"
    equation: ClassVar[str] = (
        "L = -f'(u(demonstration)) + [u f'(u) - f(u)](sample of ref), u = pi/ref"
    )

    divergence: str = Field(
        "jensen_shannon", description=f"one of {', '.join(divergences.names())}, or one registered"
    )

    @field_validator("divergence")
    @classmethod
    def _known(cls, name: str) -> str:
        divergences.get(name)
        return name

    def loss(self, batch: PairBatch) -> LossTerms:
        terms = batch.rows("fsft", fsft_loss(*batch.sequence_logps(), divergence=self.divergence))
        u = torch.exp(
            (batch.rejected.sequence() - batch.rejected.sequence("reference"))
            .detach()
            .clamp(-LIMIT, LIMIT)
        )
        # its mean is 1 as long as the rejected are the reference's samples
        return terms + LossTerms([], {"importance": u})

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        names = (
            "jensen_shannon",
            "reverse_kl",
            "forward_kl",
            "alpha",
            "hellinger",
            "jeffreys",
            "neyman_chi2",
            "chi2_kl",
        )
        return [cls(divergence=name) for name in names]
