"""IPO-MD: online IPO on samples of the policy-reference mixture."""

from typing import ClassVar

from pydantic import Field

from alignkit.batches import Draw, Plan
from alignkit.objectives.base import Objective
from alignkit.objectives.self_play.nash_md import Mixture, mixture_weights
from alignkit.objectives.self_play.online_ipo import OnlineIPO


class IPOMD(OnlineIPO):
    """IPO-MD (Calandriello et al. 2024, arXiv:2403.08635): both samples from the token-level
    mixture of policy and reference.

    A constant mixture ends at the best response to the mixture itself; the mixture is then the
    equilibrium at a higher beta, beta / (1 - mixture).
    """

    paper: ClassVar[str] = "Calandriello et al. 2024, arXiv:2403.08635"
    equation: ClassVar[str] = (
        "L = (log pi/ref(y) - log pi/ref(y') - (P(y > y') - 1/2) / beta)^2, y, y' ~ mixture"
    )

    mixture: Mixture = Field(
        0.125, description="weight of the reference in the sampler; 0 = online IPO"
    )

    @property
    def plan(self) -> Plan:
        draw = Draw(2, weights=mixture_weights(self.mixture))
        return Plan("game", samples=(draw,), feedback="pairwise")

    @classmethod
    def limits(cls) -> list[tuple[Objective, Objective]]:
        return [(cls(mixture=0), OnlineIPO())]
