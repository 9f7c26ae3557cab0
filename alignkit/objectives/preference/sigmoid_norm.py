"""DPO on log-ratios per token, so that length does not decide."""

from typing import ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.batches import LossTerms, PairBatch
from alignkit.objectives.preference.weighting import WeighablePairs
from alignkit.tensors import check_same_shape, pair_log_ratios


def sigmoid_norm_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
) -> Tensor:
    """-log sigmoid(beta * difference of the log-ratios per token): [B] x 6 -> [B].

    `chosen_lengths` and `rejected_lengths` are trained tokens; a length of 0 counts as 1. The
    length-normalised DPO of Lambert et al. 2024 (Tulu 3), arXiv:2411.15124, eq. 6.
    """
    chosen, rejected = pair_log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    margin = chosen / chosen_lengths.clamp(min=1) - rejected / rejected_lengths.clamp(min=1)
    return -logsigmoid(beta * margin)


class SigmoidNorm(WeighablePairs):
    """Length-normalised DPO (Lambert et al. 2024, arXiv:2411.15124, eq. 6)."""

    paper: ClassVar[str] = "Lambert et al. 2024, arXiv:2411.15124, eq. 6"
    equation: ClassVar[str] = (
        "L = -log sigmoid(beta * [log pi(w)/ref(w) / |w| - log pi(l)/ref(l) / |l|])"
    )

    beta: PositiveFloat = Field(
        0.1, description="scale of the log-ratios per token; 5 is usual for this form"
    )

    def loss(self, batch: PairBatch) -> LossTerms:
        losses = sigmoid_norm_loss(
            *batch.sequence_logps(),
            batch.chosen.lengths,
            batch.rejected.lengths,
            beta=self.beta,
        )
        return batch.rows("sigmoid_norm", self.weighted(losses, batch), scale=self.beta)
