"""Nash-MP: proximal steps towards the equilibrium, the proximal point a slow target policy."""

from typing import ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import Draw, Plan, TokenLogps
from alignkit.objectives.self_play.online_ipo import OnlineIPO


class NashMP(OnlineIPO):
    """Nash mirror prox (arXiv:2505.19731): self-play held to the reference and, with 1/eta of its
    weight, to a target policy.

    The penalties beta KL(pi || ref) + (beta / eta) KL(pi || target) are one KL, of weight beta (1 +
    1/eta), to the blend (eta log ref + log target) / (1 + eta). The target follows the policy (the
    recipe's `target` section: an EMA, or a copy every k steps). A frozen target ends at one
    proximal step; each contracts KL(equilibrium || pi) by at least 1 / (1 + eta).
    """

    paper: ClassVar[str] = "arXiv:2505.19731"
    equation: ClassVar[str] = (
        "L = (log pi/a(y) - log pi/a(y') - (P(y > y') - 1/2) eta / (beta (1 + eta)))^2, a = ref^eta target, y, y' ~ pi"
    )

    eta: PositiveFloat = Field(
        1.0, description="proximal step: the reference's weight over the target's"
    )

    @property
    def plan(self) -> Plan:
        return Plan(
            "game", anchors=("reference", "target"), samples=(Draw(2),), feedback="pairwise"
        )

    def anchor(self, tokens: TokenLogps) -> Tensor:
        """The blend of reference and target [B], not normalised: pairs cancel the constant."""
        return (self.eta * self.reduced(tokens, "reference") + self.reduced(tokens, "target")) / (
            1 + self.eta
        )

    @property
    def temperature(self) -> float:
        """Weight of the two KLs together."""
        return self.beta * (1 + 1 / self.eta)
