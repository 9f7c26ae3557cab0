"""EGPO: extragradient preference optimisation."""

from typing import ClassVar

from torch import Tensor

from alignkit.batches import Draw, GameBatch, Plan
from alignkit.objectives.self_play.online_ipo import OnlineIPO


class EGPO(OnlineIPO):
    """Extragradient preference optimisation (Zhou et al. 2025, arXiv:2503.08942).

    Two samples are judged against one opponent; the loop takes a trial step, samples there and
    takes the real step from where it started. The exact form converges linearly in the last
    iterate, cycles or not.
    """

    paper: ClassVar[str] = "Zhou et al. 2025, arXiv:2503.08942"
    equation: ClassVar[str] = (
        "L = (log pi/ref(y) - log pi/ref(y') - (P(y > y'') - P(y' > y'')) / beta)^2, extragradient in y, y', y''"
    )

    @property
    def plan(self) -> Plan:
        return Plan(
            "game",
            samples=(Draw(2), Draw(1, scored=False)),
            feedback="pairwise",
            update="extragradient",
        )

    def gap(self, batch: GameBatch) -> Tensor:
        """P(first > opponent) - P(second > opponent) [B]."""
        return batch.preference[:, 0] - batch.preference[:, 1]
