"""SPPO's squared regression with labels instead of a judge's probabilities."""

from typing import ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import LossTerms, PairBatch
from alignkit.objectives.preference.weighting import WeighablePairs
from alignkit.tensors import pair_log_ratios


def sppo_hard_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """(chosen log-ratio - 1 / (2 beta))^2 + (rejected log-ratio + 1 / (2 beta))^2: [B] x 4 -> [B].

    Wu et al. 2024, arXiv:2405.00675, eq. 4.7, with the winner's probability set to 1 and the
    loser's to 0. The objective `sppo` is the method of the paper, with a judge.
    """
    chosen, rejected = pair_log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


class SPPOHard(WeighablePairs):
    """SPPO on labelled pairs (Wu et al. 2024, arXiv:2405.00675, eq. 4.7)."""

    paper: ClassVar[str] = "Wu et al. 2024, arXiv:2405.00675, eq. 4.7"
    equation: ClassVar[str] = (
        "L = (log pi(w)/ref(w) - 1/(2 beta))^2 + (log pi(l)/ref(l) + 1/(2 beta))^2"
    )

    beta: PositiveFloat = Field(0.1, description="the target of a log-ratio is +-1 / (2 beta)")

    def loss(self, batch: PairBatch) -> LossTerms:
        losses = sppo_hard_loss(*batch.sequence_logps(), beta=self.beta)
        return batch.rows("sppo_hard", self.weighted(losses, batch), scale=self.beta)
