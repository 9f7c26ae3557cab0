"""INPO: no-regret steps, each a regression on pairs of the last policy."""

from typing import ClassVar, Self

from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from alignkit.batches import Draw, Plan, TokenLogps
from alignkit.objectives.base import Objective
from alignkit.objectives.self_play.nash_mp import NashMP
from alignkit.objectives.self_play.online_ipo import OnlineIPO


class INPO(OnlineIPO):
    """Iterative Nash policy optimisation (Zhang et al. 2024, arXiv:2407.00617).

    Pairs come from the target, the policy of the last iteration (the recipe's `target` section: a
    copy every k steps). The minimiser is the mirror step (beta / step) log ref + (1 - beta / step)
    log target + P target / step: online mirror descent, whose average has no regret and whose last
    iterate may go in circles.
    """

    paper: ClassVar[str] = "Zhang et al. 2024, arXiv:2407.00617"
    equation: ClassVar[str] = (
        "L = (log pi/a(y) - log pi/a(y') - (P(y > y') - 1/2) / step)^2, a = ref^(beta/step) target^(1-beta/step), y, y' ~ target"
    )

    step: PositiveFloat = Field(
        0.3, description="inverse step: weight of both KLs together; more than beta"
    )

    @model_validator(mode="after")
    def _wide_enough(self) -> Self:
        if not self.step > self.beta:
            raise ValueError(
                f"step {self.step} must be more than beta {self.beta}: the rest is the KL to the last policy"
            )
        return self

    @property
    def plan(self) -> Plan:
        return Plan(
            "game",
            anchors=("reference", "target"),
            samples=(Draw(2, source="target"),),
            feedback="pairwise",
        )

    @classmethod
    def limits(cls) -> list[tuple[Objective, Objective]]:
        """One iteration is Nash-MP's proximal step in another parametrisation."""
        return [(cls(beta=0.1, step=0.3), NashMP(beta=0.1, eta=0.5))]

    def anchor(self, tokens: TokenLogps) -> Tensor:
        """The blend of reference and target [B], not normalised: pairs cancel the constant."""
        weight = self.beta / self.step
        return weight * self.reduced(tokens, "reference") + (1 - weight) * self.reduced(
            tokens, "target"
        )

    @property
    def temperature(self) -> float:
        """Weight of the two KLs together."""
        return self.step
