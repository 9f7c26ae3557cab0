"""Nash-EMA: policy gradient against a slow copy of the policy."""

from typing import ClassVar

from alignkit.batches import Draw, Plan
from alignkit.objectives.self_play.nash_md import NashPolicyGradient


class NashEMA(NashPolicyGradient):
    """Nash-EMA (Munos et al. 2023, arXiv:2312.00886, section 7): the opponent is an exponential
    moving average of the policy's *parameters* (the recipe's `target` section), a first-order
    stand-in for an average of policies. It ends at the equilibrium.
    """

    paper: ClassVar[str] = "Munos et al. 2023, arXiv:2312.00886, section 7"
    equation: ClassVar[str] = (
        "grad L = -grad log pi(y) * (P(y > y') - 1/2 - beta log pi(y)/ref(y)), y ~ pi, y' ~ EMA of pi"
    )

    @property
    def plan(self) -> Plan:
        return Plan(
            "game",
            anchors=("reference", "target"),
            samples=(Draw(1), Draw(1, source="target", scored=False)),
            feedback="pairwise",
        )
