"""Binary classifier optimisation on pairs, without the running shift of the rewards."""

from typing import ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.batches import LossTerms, PairBatch
from alignkit.objectives.preference.weighting import WeighablePairs
from alignkit.tensors import pair_log_ratios


def bco_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """-log sigmoid(beta * chosen log-ratio) - log sigmoid(-beta * rejected log-ratio):
    [B] x 4 -> [B].

    An upper bound of DPO's loss. Jung et al. 2024, arXiv:2404.04656, eq. 9, with the reward shift
    left at 0.
    """
    chosen, rejected = pair_log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    return -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected)


class BCOPair(WeighablePairs):
    """BCO on pairs (Jung et al. 2024, arXiv:2404.04656), with the reward shift left at 0."""

    paper: ClassVar[str] = "Jung et al. 2024, arXiv:2404.04656, eq. 9"
    equation: ClassVar[str] = (
        "L = -log sigmoid(beta * log pi(w)/ref(w)) - log sigmoid(-beta * log pi(l)/ref(l))"
    )

    beta: PositiveFloat = Field(0.1, description="scale of the log-ratios")

    def loss(self, batch: PairBatch) -> LossTerms:
        losses = bco_loss(*batch.sequence_logps(), beta=self.beta)
        return batch.rows("bco_pair", self.weighted(losses, batch), scale=self.beta)
