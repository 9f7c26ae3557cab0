"""Direct preference optimisation."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.batches import LossTerms, PairBatch
from alignkit.objectives.base import Objective, tilted
from alignkit.objectives.preference.weighting import WeighablePairs
from alignkit.tensors import pair_log_ratios


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """DPO loss per pair: [B] x 4 -> [B].

    `label_smoothing` is the probability that a label is flipped (cDPO).

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7; label smoothing: Mitchell 2023, "A note on DPO
    with noisy preferences".
    """
    chosen, rejected = pair_log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    logits = beta * (chosen - rejected)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


class DPO(WeighablePairs):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, eq. 7)."""

    paper: ClassVar[str] = "Rafailov et al. 2023, arXiv:2305.18290, eq. 7"
    equation: ClassVar[str] = "L = -log sigmoid(beta * [log pi(w)/ref(w) - log pi(l)/ref(l)])"

    beta: PositiveFloat = Field(0.1, description="strength of the reverse KL to the reference")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="probability that a label is flipped (cDPO)"
    )

    def loss(self, batch: PairBatch) -> LossTerms:
        losses = dpo_loss(
            *batch.sequence_logps(), beta=self.beta, label_smoothing=self.label_smoothing
        )
        return batch.rows("dpo", self.weighted(losses, batch), scale=self.beta)

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """ref * exp(reward / beta), normalised; none with label
        smoothing (the smoothed labels are not Bradley-Terry).
        """
        if self.label_smoothing:
            return None
        return tilted(reward, reference, self.beta)

    def backup(self, values: Tensor, reference: Tensor) -> Tensor | None:
        """The soft value beta * log E_ref exp(values / beta)."""
        return (
            None
            if self.label_smoothing
            else self.beta * (reference + values / self.beta).logsumexp(-1)
        )

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(label_smoothing=0.1)]
