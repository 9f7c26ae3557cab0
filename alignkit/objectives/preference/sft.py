"""Supervised fine-tuning: maximum likelihood of demonstrations."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from alignkit.batches import LossTerms, PairBatch, SequenceBatch, Term
from alignkit.objectives.base import Objective, SequenceObjective
from alignkit.tensors import check_same_shape


def sft_loss(policy_logps: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood per token, 0 outside the mask: [B, T] x 2 -> [B, T].

    >>> sft_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, False]]))
    tensor([[1., 0.]])
    """
    check_same_shape(policy_logps=policy_logps, mask=mask)
    return (-policy_logps).where(mask, policy_logps.new_zeros(()))


def dft_loss(policy_logps: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood times the token's own probability, which gets no gradient, per token;
    0 outside the mask: [B, T] x 2 -> [B, T]. Unlikely tokens teach less.

    Wu et al. 2025, arXiv:2508.05629, eq. 9.
    """
    return sft_loss(policy_logps, mask) * policy_logps.detach().exp()


class SFT(SequenceObjective):
    """Supervised fine-tuning on demonstrations, or on the chosen
    completions of pairs in a weighted list.
    """

    paper: ClassVar[str] = "maximum likelihood"
    equation: ClassVar[str] = "L = -sum_t log pi(y_t | x, y_<t) / tokens"

    form: Literal["nll", "dft"] = Field(
        "nll", description="dft: each token also times its own probability (arXiv:2508.05629)"
    )

    @property
    def surrogate(self) -> bool:
        return self.form == "dft"

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(form="dft")]

    def loss(self, batch: SequenceBatch | PairBatch) -> LossTerms:
        tokens = batch.chosen if isinstance(batch, PairBatch) else batch.tokens
        nll = sft_loss(tokens.policy, tokens.mask)
        losses = nll if self.form == "nll" else dft_loss(tokens.policy, tokens.mask)
        term = Term("sft", losses, unit="tokens")
        return LossTerms([term], {"nll": nll.detach()[tokens.mask]})
