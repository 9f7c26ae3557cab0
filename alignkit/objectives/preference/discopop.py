"""DiscoPOP: a loss that a language model discovered, a blend of logistic and exponential."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.batches import LossTerms, PairBatch
from alignkit.errors import ConfigError
from alignkit.objectives.base import Objective
from alignkit.objectives.preference.weighting import WeighablePairs
from alignkit.tensors import pair_log_ratios


def discopop_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    discopop_tau: float = 0.05,
) -> Tensor:
    """(1 - s) * -log sigmoid(x) + s * exp(-x) with x = beta * margin and s = sigmoid(x / tau):
    [B] x 4 -> [B].

    ConfigError for a tau outside (0, 1], where the exponential part has no bound. Lu et al. 2024,
    arXiv:2406.08414, eq. 5.
    """
    if not 0 < discopop_tau <= 1:
        raise ConfigError(f"discopop_tau is {discopop_tau}; it should be above 0 and at most 1")
    chosen, rejected = pair_log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    logits = beta * (chosen - rejected)
    logistic = -logsigmoid(logits) * (-logits / discopop_tau).sigmoid()

    # exp(-x) alone overflows where s makes it vanish, so both are one exponential.
    exponential = (logsigmoid(logits / discopop_tau) - logits).exp()
    return logistic + exponential


class DiscoPOP(WeighablePairs):
    """DiscoPOP (Lu et al. 2024, arXiv:2406.08414, eq. 5).

    The loss is not monotone, as its authors report: near a margin of 0 it rises with the margin (at
    tau 0.05 for beta * margin between about -0.12 and 0.07), so such pairs are pulled together.
    """

    paper: ClassVar[str] = "Lu et al. 2024, arXiv:2406.08414, eq. 5"
    equation: ClassVar[str] = (
        "L = (1 - s) * -log sigmoid(x) + s * exp(-x), x = beta * margin, s = sigmoid(x / tau)"
    )

    favours_better = "not everywhere"

    beta: PositiveFloat = Field(0.1, description="scale of the margin")
    discopop_tau: Annotated[float, Field(gt=0, le=1)] = Field(
        0.05, description="temperature of the blend between the two parts"
    )

    def loss(self, batch: PairBatch) -> LossTerms:
        losses = discopop_loss(
            *batch.sequence_logps(), beta=self.beta, discopop_tau=self.discopop_tau
        )
        return batch.rows("discopop", self.weighted(losses, batch), scale=self.beta)

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(beta=1.0, discopop_tau=0.5)]
