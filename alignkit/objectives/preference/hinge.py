"""The hinge loss on the log-ratio margin (RSO's hinge-norm; SLiC with a reference)."""

from typing import ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import LossTerms, PairBatch
from alignkit.objectives.preference.weighting import WeighablePairs
from alignkit.tensors import pair_log_ratios


def hinge_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Hinge loss per pair, max(0, 1 - beta * margin): [B] x 4 -> [B]. Its population form fits only
    the sign of P - 1/2.

    Liu et al. 2023, arXiv:2309.06657 (hinge-norm).
    """
    chosen, rejected = pair_log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    return (1 - beta * (chosen - rejected)).relu()


class Hinge(WeighablePairs):
    """RSO's hinge-norm (Liu et al. 2023, arXiv:2309.06657)."""

    paper: ClassVar[str] = "Liu et al. 2023, arXiv:2309.06657"
    equation: ClassVar[str] = "L = max(0, 1 - beta * [log pi(w)/ref(w) - log pi(l)/ref(l)])"

    beta: PositiveFloat = Field(
        0.1, description="scale of the margin; the loss is flat from a margin of 1 / beta on"
    )

    def loss(self, batch: PairBatch) -> LossTerms:
        losses = hinge_loss(*batch.sequence_logps(), beta=self.beta)
        return batch.rows("hinge", self.weighted(losses, batch), scale=self.beta)
