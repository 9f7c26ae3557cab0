"""DPKD: distillation as preference, the teacher's response
over the student's own, anchored at the teacher.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignkit.batches import LossTerms, PairBatch, Term
from alignkit.objectives.base import Objective, PairObjective
from alignkit.objectives.preference.dpo import DPO
from alignkit.objectives.preference.sft import sft_loss
from alignkit.tensors import pair_log_ratios


def dpkd_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float,
) -> Tensor:
    """-log sigmoid(beta * [r(w)/|w| - r(l)/|l|]) per pair from log-prob sums and lengths in tokens:
    [B] x 6 -> [B].

    Lengths of 1 leave the sums as they are: DPO. Li et al. 2024, arXiv:2406.19774, eq. 9 (its code
    compares token by token).
    """
    chosen, rejected = pair_log_ratios(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    )
    chosen_mean = chosen / chosen_lengths.clamp(min=1)
    rejected_mean = rejected / rejected_lengths.clamp(min=1)
    return -logsigmoid(beta * (chosen_mean - rejected_mean))


class DPKD(PairObjective):
    """Direct preference knowledge distillation (Li et al. 2024, arXiv:2406.19774). `reference.kind`
    is the teacher's path; chosen responses are the teacher's, rejected ones the student's.
    """

    paper: ClassVar[str] = "Li et al. 2024, arXiv:2406.19774, eq. 9"
    equation: ClassVar[str] = (
        "L = -log sigmoid(beta * [r(w)/|w| - r(l)/|l|]) + lm_weight * NLL(w), r = log student/teacher"
    )

    beta: PositiveFloat = Field(
        1.0, description="strength of the reverse KL to the teacher, per token in the mean form"
    )
    form: Literal["mean", "sum"] = Field(
        "mean", description="log-ratios divided by the response's length, or not"
    )
    lm_weight: NonNegativeFloat = Field(
        0.5, description="weight of the teacher response's likelihood, per token"
    )

    def loss(self, batch: PairBatch) -> LossTerms:
        chosen = batch.chosen.lengths
        rejected = batch.rejected.lengths
        if self.form == "sum":
            chosen = chosen.clamp(max=1)
            rejected = rejected.clamp(max=1)
        losses = dpkd_loss(*batch.sequence_logps(), chosen, rejected, beta=self.beta)
        terms = batch.rows("dpkd", losses, scale=self.beta)
        if not self.lm_weight:
            return terms
        nll = sft_loss(batch.chosen.policy, batch.chosen.mask)
        likelihood = Term("lm", nll, unit="tokens", weight=self.lm_weight)
        return terms + LossTerms([likelihood], {"nll": nll.detach()[batch.chosen.mask]})

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """teacher * exp(reward / beta) for the sum form alone."""
        if self.form == "mean" or self.lm_weight:
            return None
        return DPO(beta=self.beta).optimum(reward, reference)

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(form="sum", lm_weight=0.0)]

    @classmethod
    def limits(cls) -> Sequence[tuple[Objective, Objective]]:
        return [(cls(beta=0.1, form="sum", lm_weight=0.0), DPO(beta=0.1))]
