"""LUSPO: GSPO with each completion weighted by its length, so that short ones are not favoured."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from alignkit.batches import LossTerms, RolloutBatch
from alignkit.kl import importance
from alignkit.objectives.base import Objective
from alignkit.objectives.online.gspo import GSPO, gspo_loss
from alignkit.objectives.rollout_base import ClipWidth, advantages_of, unspread
from alignkit.tensors import masked_mean


class LUSPO(GSPO):
    """Length-unbiased sequence policy optimisation (2026, arXiv:2602.05261): the gradient of a
    token does not depend on the length of its completion. `aggregation` has nothing to do: a
    completion is one term.
    """

    paper: ClassVar[str] = "LUSPO 2026, arXiv:2602.05261"
    equation: ClassVar[str] = (
        "L = |y| max(-s A, -clip(s) A), s = (pi/pi_old)(y)^(1/|y|); A = (score - mean) / std"
    )

    clip_low: ClipWidth | None = Field(
        2e-3, description="no gain from a ratio below 1 - this; null = off"
    )
    clip_high: ClipWidth | None = Field(
        2.5e-3, description="no gain from a ratio above 1 + this; null = off"
    )

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(clip_low=0.2, clip_high=0.3, scale_by_std=False)]

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        mask = tokens.mask
        logps = tokens.policy
        old = tokens.get("behavior")
        values = gspo_loss(logps, old, unspread(advantages_of(batch), tokens), mask, **self.clip)

        ratio = importance(masked_mean(logps, mask), masked_mean(old, mask))
        term = self.term("luspo", tokens.lengths * values, tokens)
        return LossTerms([term], self.metrics(tokens, ratio))
