"""Plackett-Luce distillation: the answer's token first, then the teacher's order of all others."""

from typing import ClassVar

from torch import Tensor

from alignkit.batches import LossTerms, Plan, SequenceBatch, Term
from alignkit.objectives.base import SequenceObjective
from alignkit.objectives.distillation.teacher_base import teacher_law
from alignkit.objectives.teacher_losses import pld_loss


def ranking(policy_logprobs: Tensor, teacher_logprobs: Tensor | None, labels: Tensor) -> Tensor:
    """`pld_loss` as the plan's statistic: [C, V] x 2, [C] -> [C]."""
    return pld_loss(policy_logprobs, teacher_law(teacher_logprobs), labels)


class PLD(SequenceObjective):
    """Plackett-Luce distillation (arXiv:2506.12542): a ranking loss over the whole vocabulary,
    weighted by the teacher. A teacher that is sure of the answer's token gives the cross-entropy.
    """

    paper: ClassVar[str] = "PLD, arXiv:2506.12542"
    equation: ClassVar[str] = (
        "L = sum_k q_k (logsumexp_{j >= k} z_j - z_k) per token, label first, then by the teacher q"
    )
    favours_better: ClassVar = "no preference"

    @property
    def plan(self) -> Plan:
        return Plan("sequence", {"pld": ranking}, ("teacher",))

    def loss(self, batch: SequenceBatch) -> LossTerms:
        tokens = batch.tokens
        nll = -tokens.policy.detach()[tokens.mask]
        return LossTerms([Term("pld", tokens.extras["pld"], "tokens")], {"nll": nll})
