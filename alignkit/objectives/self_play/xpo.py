"""XPO: online DPO that explores."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, NonNegativeFloat

from alignkit.batches import Draw, GameBatch, LossTerms, Plan, Term
from alignkit.objectives.base import Objective
from alignkit.objectives.self_play.online_dpo import OnlineDPO


class XPO(OnlineDPO):
    """Exploratory preference optimisation (Xie et al. 2024, arXiv:2405.21046): a sample of the
    policy against one of the reference, and a bonus for moving probability off the reference's
    sample, the optimism that makes it explore.

    Made for Bradley-Terry judges, as `online_dpo` is.
    """

    paper: ClassVar[str] = "Xie et al. 2024, arXiv:2405.21046, algorithm 1"
    equation: ClassVar[str] = "L = online DPO(y, y') + alpha log pi(y'), y ~ pi, y' ~ ref"

    own: ClassVar[int] = 1

    alpha: NonNegativeFloat = Field(1e-5, description="weight of the optimism; 0 = none")

    @property
    def plan(self) -> Plan:
        return Plan("game", samples=(Draw(1), Draw(1, source="reference")), feedback="pairwise")

    @classmethod
    def limits(cls) -> Sequence[tuple[Objective, Objective]]:
        return [(cls(alpha=0), OnlineDPO())]

    def loss(self, batch: GameBatch) -> LossTerms:
        optimism = Term("optimism", batch.completions[1].sequence(), weight=self.alpha)
        return super().loss(batch) + LossTerms([optimism])
