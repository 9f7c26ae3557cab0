"""Direct preference optimisation."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor, zeros_like
from torch.nn.functional import logsigmoid

from alignkit.batches import LossTerms, PairBatch, Plan
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
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

    `reference_free` trains GenARM's autoregressive reward model (Xu et al. 2024, arXiv:2410.08193).
    """

    paper: ClassVar[str] = "Rafailov et al. 2023, arXiv:2305.18290, eq. 7"
    equation: ClassVar[str] = "L = -log sigmoid(beta * [log pi(w)/ref(w) - log pi(l)/ref(l)])"

    beta: PositiveFloat = Field(0.1, description="strength of the reverse KL to the reference")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="probability that a label is flipped (cDPO)"
    )

    reference_free: bool = Field(
        False,
        description="compare log-probs, not log-ratios: trains an autoregressive reward to fuse with "
        "(GenARM)",
    )

    @property
    def plan(self) -> Plan:
        return self.pair_plan(anchors=() if self.reference_free else ("reference",))

    def loss(self, batch: PairBatch) -> LossTerms:
        if self.reference_free:
            chosen = batch.chosen.sequence()
            rejected = batch.rejected.sequence()
            logps = (chosen, rejected, zeros_like(chosen), zeros_like(rejected))
        else:
            logps = batch.sequence_logps()
        losses = dpo_loss(*logps, beta=self.beta, label_smoothing=self.label_smoothing)
        return batch.rows("dpo", self.weighted(losses, batch), scale=self.beta)

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """ref * exp(reward / beta), normalised; none with label
        smoothing (the smoothed labels are not Bradley-Terry).

        Without a reference it is exp(reward / beta), normalised (Xu et al. 2024, arXiv:2410.08193).
        """
        if self.label_smoothing:
            return None
        if self.reference_free:
            return (reward / self.beta).log_softmax(-1)
        return tilted(reward, reference, self.beta)

    def backup(self, values: Tensor, reference: Tensor) -> Tensor | None:
        """The soft value beta * log E_ref exp(values / beta)."""
        return (
            None
            if self.label_smoothing or self.reference_free
            else self.beta * (reference + values / self.beta).logsumexp(-1)
        )

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        # A subclass with a loss of its own may read the reference in any setting.
        free = [cls(reference_free=True)] if cls.loss is DPO.loss else []
        return [cls(), cls(label_smoothing=0.1), *free]
