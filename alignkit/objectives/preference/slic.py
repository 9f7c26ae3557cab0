"""SLiC-HF: a margin on the log-probs themselves, without a
reference, beside the likelihood of the chosen response.
"""

from typing import ClassVar

from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from alignkit.batches import LossTerms, PairBatch, Plan
from alignkit.objectives.base import PairObjective
from alignkit.tensors import check_same_shape


def slic_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    *,
    delta: float,
    sft_weight: float = 0.0,
) -> Tensor:
    """max(0, delta - log pi(w) + log pi(l)) - sft_weight * log
    pi(w) per pair: [B] x 2 -> [B], log-prob sums.

    Zhao et al. 2023, arXiv:2305.10425, with the chosen response as the target of the likelihood
    term.
    """
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps
    )
    return (
        delta - policy_chosen_logps + policy_rejected_logps
    ).relu() - sft_weight * policy_chosen_logps


class SLiC(PairObjective):
    """SLiC-HF (Zhao et al. 2023, arXiv:2305.10425).

    Nothing but the likelihood term anchors the policy.
    """

    paper: ClassVar[str] = "Zhao et al. 2023, arXiv:2305.10425"
    equation: ClassVar[str] = "L = max(0, delta - log pi(w) + log pi(l)) - sft_weight * log pi(w)"

    delta: PositiveFloat = Field(
        1.0, description="margin in nats between the log-probs; the first term is flat beyond it"
    )
    sft_weight: NonNegativeFloat = Field(
        0.1, description="weight of the chosen response's likelihood"
    )

    @property
    def plan(self) -> Plan:
        return Plan("pair", anchors=())

    def loss(self, batch: PairBatch) -> LossTerms:
        chosen = batch.chosen.sequence()
        rejected = batch.rejected.sequence()
        return batch.rows(
            "slic", slic_loss(chosen, rejected, delta=self.delta, sft_weight=self.sft_weight)
        )
