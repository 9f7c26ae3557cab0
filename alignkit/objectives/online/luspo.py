"""LUSPO: GSPO with each completion weighted by its length, so that short ones are not favoured."""

from typing import ClassVar

from pydantic import Field

from alignkit.batches import LossTerms, RolloutBatch
from alignkit.objectives.online.gspo import GSPO
from alignkit.objectives.rollout_base import ClipWidth


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

    def loss(self, batch: RolloutBatch) -> LossTerms:
        values, metrics = self.completion_losses(batch)
        term = self.term("luspo", batch.tokens.lengths * values, batch.tokens)
        return LossTerms([term, *self.entropy_terms(batch.tokens)], metrics)
