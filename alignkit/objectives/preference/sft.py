"""Supervised fine-tuning: maximum likelihood of demonstrations."""

from typing import ClassVar

from torch import Tensor

from alignkit.batches import LossTerms, PairBatch, SequenceBatch, Term
from alignkit.objectives.base import SequenceObjective
from alignkit.tensors import check_same_shape


def sft_loss(policy_logps: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood per token, 0 outside the mask: [B, T] x 2 -> [B, T].

    >>> sft_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, False]]))
    tensor([[1., 0.]])
    """
    check_same_shape(policy_logps=policy_logps, mask=mask)
    return (-policy_logps).where(mask, policy_logps.new_zeros(()))


class SFT(SequenceObjective):
    """Supervised fine-tuning on demonstrations, or on the chosen
    completions of pairs in a weighted list.
    """

    paper: ClassVar[str] = "maximum likelihood"
    equation: ClassVar[str] = "L = -sum_t log pi(y_t | x, y_<t) / tokens"

    def loss(self, batch: SequenceBatch | PairBatch) -> LossTerms:
        tokens = batch.chosen if isinstance(batch, PairBatch) else batch.tokens
        nll = sft_loss(tokens.policy, tokens.mask)
        return LossTerms([Term("sft", nll, unit="tokens")], {"nll": nll.detach()[tokens.mask]})
