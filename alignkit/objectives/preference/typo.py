"""TYPO: preferences and the reference as two terms of one loss, so that its optimum interpolates
between the two.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, NonNegativeFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.batches import LossTerms, PairBatch, Plan
from alignkit.objectives.base import Objective, PairObjective
from alignkit.tensors import check_same_shape


def typo_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, *, reference_weight: float
) -> Tensor:
    """-log sigmoid(log pi(w) - log pi(l)) - reference_weight * mean log pi of both, per pair: [B] x
    2 -> [B].

    The second term is KL(ref || pi) up to a constant where both responses are samples of the
    reference; its log-probs are not needed. Hu et al. 2024, arXiv:2407.09072; how the paper weighs
    the two terms we could not check.
    """
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps
    )
    likelihood = (policy_chosen_logps + policy_rejected_logps) / 2
    return -logsigmoid(policy_chosen_logps - policy_rejected_logps) - reference_weight * likelihood


class TYPO(PairObjective):
    """TYPO (Hu et al. 2024, arXiv:2407.09072).

    Both responses of a pair must be samples of the reference.
    """

    paper: ClassVar[str] = "Hu et al. 2024, arXiv:2407.09072"
    equation: ClassVar[str] = "L = -log sigmoid(log pi(w) - log pi(l)) - lambda * E_ref log pi"

    reference_weight: NonNegativeFloat = Field(
        1.0, description="lambda: 0 fits the preferences, large values the reference"
    )

    @property
    def plan(self) -> Plan:
        return Plan("pair", anchors=())

    def loss(self, batch: PairBatch) -> LossTerms:
        chosen = batch.chosen.sequence()
        rejected = batch.rejected.sequence()
        return batch.rows(
            "typo", typo_loss(chosen, rejected, reference_weight=self.reference_weight)
        )

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """exp(reward), normalised, without the second term; with it none."""
        return reward.log_softmax(-1) if not self.reference_weight else None

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(reference_weight=0.0)]
