"""Preference models: what beats what, without assuming a
reward; preferences that go in circles included.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from alignkit.batches import LossTerms, Plan, ScoredBatch, Term
from alignkit.objectives.base import Objective
from alignkit.tensors import check_same_shape


def skew_product(first: Tensor, second: Tensor) -> Tensor:
    """Sum over k of first[2k] second[2k+1] - first[2k+1] second[2k]: [..., D] x 2 -> [...]. Changes
    its sign with the order.

    An odd last entry is paired with 0. With second entries fixed at 1 it is a difference of
    rewards, Bradley-Terry.
    """
    check_same_shape(first=first, second=second)
    a, b = (pad(t, (0, t.shape[-1] % 2)).unflatten(-1, (-1, 2)) for t in (first, second))
    return (a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]).sum(-1)


class PreferenceModel(Objective):
    """Likelihood of pairwise preferences under a model of pairs.

    general: each completion has an embedding, and the skew-symmetric product of two is the log-odds
    (Zhang et al. 2024, arXiv:2410.02197; embeddings are not normalised here). classifier: one
    network reads both completions, in either order.
    """

    paper: ClassVar[str] = (
        "Zhang et al. 2024, arXiv:2410.02197; pairwise classifier: Jiang et al. 2023, arXiv:2306.02561"
    )
    equation: ClassVar[str] = (
        "L = -log sigmoid(v(w)^T R v(l)), R skew-symmetric; or -log sigmoid of s(w, l) and of -s(l, w)"
    )

    form: Literal["general", "classifier"] = Field(
        "general", description="general: embeddings; classifier: reads both at once"
    )
    dimension: Annotated[int, Field(ge=2)] = Field(
        8, description="numbers of an embedding (form general)"
    )

    @property
    def plan(self) -> Plan:
        joined = self.form == "classifier"
        return Plan("pair", anchors=(), outputs=1 if joined else self.dimension, joined=joined)

    def log_odds(self, first: Tensor, second: Tensor) -> Tensor:
        """log P/(1 - P) that the first beats the second, from the outputs [B, D] of both
        completions, or of the two joined as (first, second) and as (second, first): -> [B].
        """
        if self.form == "general":
            return skew_product(first, second)
        return (first.sum(-1) - second.sum(-1)) / 2

    def loss(self, batch: ScoredBatch) -> LossTerms:
        first, second = batch.pairs()
        odds = self.log_odds(first, second)

        # The classifier reads both orders and learns from each; the embeddings know no order.
        both = (odds, odds) if self.form == "general" else (first.sum(-1), -second.sum(-1))
        losses = -(logsigmoid(both[0]) + logsigmoid(both[1])) / 2

        margins = odds.detach()
        metrics = {
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).to(margins.dtype),
        }
        return LossTerms([Term("preference_model", losses)], metrics)

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(form="classifier")]
