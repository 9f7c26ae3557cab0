"""Noise contrastive alignment on pairs: absolute rewards instead of their difference."""

from typing import ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.batches import LossTerms, PairBatch
from alignkit.objectives.preference.weighting import WeighablePairs
from alignkit.tensors import pair_log_ratios


def nca_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """-log sigmoid(r_w) - (log sigmoid(-r_w) + log sigmoid(-r_l)) / 2 with r = beta * log-ratio:
    [B] x 4 -> [B].

    Unlike DPO's loss it keeps the chosen response from losing likelihood. Chen et al. 2024,
    arXiv:2402.05369, eq. 13, for two responses.
    """
    chosen, rejected = pair_log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    better = beta * chosen
    worse = beta * rejected
    return -logsigmoid(better) - 0.5 * logsigmoid(-better) - 0.5 * logsigmoid(-worse)


class NCAPair(WeighablePairs):
    """NCA on pairs (Chen et al. 2024, arXiv:2402.05369, eq. 13)."""

    paper: ClassVar[str] = "Chen et al. 2024, arXiv:2402.05369, eq. 13"
    equation: ClassVar[str] = (
        "L = -log sigmoid(r(w)) - [log sigmoid(-r(w)) + log sigmoid(-r(l))] / 2, "
        "r = beta * log pi/ref"
    )

    beta: PositiveFloat = Field(0.1, description="scale of the log-ratios")

    def loss(self, batch: PairBatch) -> LossTerms:
        losses = nca_loss(*batch.sequence_logps(), beta=self.beta)
        return batch.rows("nca_pair", self.weighted(losses, batch), scale=self.beta)
