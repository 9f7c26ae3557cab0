"""EXO on pairs: the reverse KL from the policy's preference to the labels'."""

import math
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


def exo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 1e-3,
) -> Tensor:
    """KL(policy's preference || (1 - label_smoothing, label_smoothing)) per pair: [B] x 4 -> [B].

    The policy prefers the chosen response with probability sigmoid(beta * margin). ConfigError for
    a label_smoothing outside (0, 1): at 0 the KL is infinite. Ji et al. 2024, arXiv:2402.00856,
    eq. 16.
    """
    if not 0 < label_smoothing < 1:
        raise ConfigError(
            f"label_smoothing is {label_smoothing}; EXO needs a value between 0 and 1, such as 1e-3"
        )
    chosen, rejected = pair_log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    logits = beta * (chosen - rejected)
    wins = logits.sigmoid() * (logsigmoid(logits) - math.log1p(-label_smoothing))
    loses = (-logits).sigmoid() * (logsigmoid(-logits) - math.log(label_smoothing))
    return wins + loses


class EXOPair(WeighablePairs):
    """EXO-pref (Ji et al. 2024, arXiv:2402.00856, eq. 16)."""

    paper: ClassVar[str] = "Ji et al. 2024, arXiv:2402.00856, eq. 16"
    equation: ClassVar[str] = "L = KL(sigmoid(beta * margin) || 1 - label_smoothing)"
    favours_better = "near"

    beta: PositiveFloat = Field(0.1, description="scale of the margin")
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        1e-3, description="probability that a label is flipped"
    )

    def loss(self, batch: PairBatch) -> LossTerms:
        losses = exo_loss(
            *batch.sequence_logps(), beta=self.beta, label_smoothing=self.label_smoothing
        )
        return batch.rows("exo_pair", self.weighted(losses, batch), scale=self.beta)

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(label_smoothing=0.2)]
