"""Anchored preference optimisation: where the likelihoods of both responses should move."""

from typing import ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import LossTerms, PairBatch
from alignkit.objectives.preference.weighting import WeighablePairs
from alignkit.tensors import pair_log_ratios


def apo_zero_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """1 - sigmoid(beta * chosen log-ratio) + sigmoid(beta * rejected log-ratio): [B] x 4 -> [B].

    Raises the chosen response above the reference and lowers the rejected one. D'Oosterlinck et al.
    2024, arXiv:2408.06266, eq. 7.
    """
    chosen, rejected = pair_log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()


def apo_down_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """sigmoid(beta * chosen log-ratio) + 1 - sigmoid(beta * margin): [B] x 4 -> [B].

    Lowers both responses, the rejected one more. D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8.
    """
    chosen, rejected = pair_log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    return (beta * chosen).sigmoid() + (-beta * (chosen - rejected)).sigmoid()


class APOZero(WeighablePairs):
    """APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7): for data whose chosen responses
    are better than the model's own.
    """

    paper: ClassVar[str] = "D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7"
    equation: ClassVar[str] = (
        "L = 1 - sigmoid(beta * log pi(w)/ref(w)) + sigmoid(beta * log pi(l)/ref(l))"
    )
    favours_better = "near"

    beta: PositiveFloat = Field(0.1, description="scale of the log-ratios")

    def loss(self, batch: PairBatch) -> LossTerms:
        losses = apo_zero_loss(*batch.sequence_logps(), beta=self.beta)
        return batch.rows("apo_zero", self.weighted(losses, batch), scale=self.beta)


class APODown(WeighablePairs):
    """APO-down (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8): for data whose chosen responses
    are worse than the model's own. It lowers the chosen response too, so a step need not favour it.
    """

    paper: ClassVar[str] = "D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8"
    equation: ClassVar[str] = (
        "L = sigmoid(beta * log pi(w)/ref(w)) + 1 - sigmoid(beta * margin of the log-ratios)"
    )
    favours_better = "not everywhere"

    beta: PositiveFloat = Field(0.1, description="scale of the log-ratios")

    def loss(self, batch: PairBatch) -> LossTerms:
        losses = apo_down_loss(*batch.sequence_logps(), beta=self.beta)
        return batch.rows("apo_down", self.weighted(losses, batch), scale=self.beta)
