"""Robust DPO: an unbiased estimate of the clean DPO loss from
labels that are flipped with a known probability.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import LossTerms, PairBatch
from alignkit.objectives.base import Objective, tilted
from alignkit.objectives.preference.dpo import DPO, dpo_loss
from alignkit.objectives.preference.weighting import WeighablePairs


def robust_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Robust DPO loss per pair: [B] x 4 -> [B]. `label_smoothing` (eps) is the probability that a
    label is flipped, below 0.5.

    Unbounded below for a single pair, as an unbiased estimate has to be: negative values are right.
    Ray Chowdhury et al. 2024, arXiv:2403.00409.
    """
    as_labelled = dpo_loss(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta=beta,
    )
    if label_smoothing == 0:  # DPO to the last bit
        return as_labelled

    flipped = dpo_loss(
        policy_rejected_logps,
        policy_chosen_logps,
        reference_rejected_logps,
        reference_chosen_logps,
        beta=beta,
    )
    estimate = (1 - label_smoothing) * as_labelled - label_smoothing * flipped
    return estimate / (1 - 2 * label_smoothing)


class RobustDPO(WeighablePairs):
    """Robust DPO (Ray Chowdhury et al. 2024, arXiv:2403.00409)."""

    paper: ClassVar[str] = "Ray Chowdhury et al. 2024, arXiv:2403.00409"
    equation: ClassVar[str] = "L = [(1 - eps) DPO(w, l) - eps DPO(l, w)] / (1 - 2 eps)"

    beta: PositiveFloat = Field(0.1, description="strength of the reverse KL to the reference")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.1, description="probability eps that a label is flipped"
    )

    def loss(self, batch: PairBatch) -> LossTerms:
        losses = robust_dpo_loss(
            *batch.sequence_logps(), beta=self.beta, label_smoothing=self.label_smoothing
        )
        return batch.rows("robust_dpo", self.weighted(losses, batch), scale=self.beta)

    def label_probability(self, reward: Tensor) -> Tensor:
        """Bradley-Terry labels, flipped with probability eps."""
        clean = super().label_probability(reward)
        return (1 - self.label_smoothing) * clean + self.label_smoothing * (1 - clean)

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """DPO's on clean labels: ref * exp(reward / beta), normalised."""
        return tilted(reward, reference, self.beta)

    @classmethod
    def limits(cls) -> Sequence[tuple[Objective, Objective]]:
        return [(cls(label_smoothing=0.0), DPO())]
