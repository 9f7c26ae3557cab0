"""H-DPO: preference optimisation with control of the policy's entropy."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.batches import LossTerms, PairBatch
from alignkit.objectives.base import Objective
from alignkit.objectives.preference.dpo import DPO
from alignkit.objectives.preference.weighting import WeighablePairs
from alignkit.tensors import check_same_shape


def hdpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    alpha: float,
) -> Tensor:
    """H-DPO loss per pair: [B] x 4 -> [B]. `alpha` weighs the policy's entropy: 1 is DPO, below 1
    sharper, above 1 flatter.

    Omura et al. 2024, arXiv:2411.07595. At the reference the margin is (alpha - 1) * beta * (log
    ref(w) - log ref(l)), not 0: the first loss on long responses of unequal length can be far from
    log 2.
    """
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
    )
    chosen = alpha * policy_chosen_logps - reference_chosen_logps.detach()
    rejected = alpha * policy_rejected_logps - reference_rejected_logps.detach()
    return -logsigmoid(beta * (chosen - rejected))


class HDPO(WeighablePairs):
    """H-DPO (Omura et al. 2024, arXiv:2411.07595)."""

    paper: ClassVar[str] = "Omura et al. 2024, arXiv:2411.07595"
    equation: ClassVar[str] = (
        "L = -log sigmoid(alpha beta [log pi(w) - log pi(l)] - beta [log ref(w) - log ref(l)])"
    )

    beta: PositiveFloat = Field(0.1, description="strength of the cross-entropy to the reference")
    alpha: PositiveFloat = Field(
        0.9, description="weight of the entropy; 1 is DPO, useful from about 0.8 to 1.2"
    )

    def loss(self, batch: PairBatch) -> LossTerms:
        policy_w, policy_l, reference_w, reference_l = batch.sequence_logps()
        losses = hdpo_loss(
            policy_w, policy_l, reference_w, reference_l, beta=self.beta, alpha=self.alpha
        )
        rewards = (
            self.beta * (self.alpha * policy_w - reference_w),
            self.beta * (self.alpha * policy_l - reference_l),
        )
        return batch.rows("hdpo", self.weighted(losses, batch), rewards=rewards)

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """ref^(1 / alpha) * exp(reward / (alpha beta)), normalised."""
        return ((reference + reward / self.beta) / self.alpha).log_softmax(-1)

    def backup(self, values: Tensor, reference: Tensor) -> Tensor | None:
        """alpha beta * log sum (ref * exp(values / beta))^(1 / alpha): entropy and cross-entropy
        both add up over tokens.
        """
        return (
            self.alpha * self.beta * ((reference + values / self.beta) / self.alpha).logsumexp(-1)
        )

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(alpha=0.9), cls(alpha=1.2)]

    @classmethod
    def limits(cls) -> Sequence[tuple[Objective, Objective]]:
        return [(cls(alpha=1.0), DPO())]
