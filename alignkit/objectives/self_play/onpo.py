"""ONPO: optimistic no-regret steps, each a regression on pairs of the last policy."""

from typing import ClassVar

from pydantic import Field, PositiveFloat

from alignkit.batches import Draw, GameBatch, LossTerms, Plan, Term
from alignkit.objectives.base import Objective
from alignkit.objectives.self_play.online_ipo import online_ipo_loss


class ONPO(Objective):
    """Optimistic online mirror descent (Zhang et al. 2025, arXiv:2502.16852): win rates against the
    last policy count twice, those against the one before it are taken off once. The average of the
    iterates nears the game's solution at the rate 1 / T.

    Both policies are copies of the policy (the recipe's `target` section, `synced`). There is no
    reference. The minimiser is target exp(step (2 P target - P previous)), exactly: a pair's
    difference cancels the normaliser that `sppo` approximates.
    """

    paper: ClassVar[str] = "Zhang et al. 2025, arXiv:2502.16852"
    equation: ClassVar[str] = (
        "L = (log pi/target(y) - log pi/target(y') - step (2 P(y > y') - 1 - P(y > z) + P(y' > z)))^2, "
        "y, y' ~ target, z ~ previous"
    )

    step: PositiveFloat = Field(0.5, description="of optimistic multiplicative weights")

    @property
    def plan(self) -> Plan:
        drawn = (Draw(2, source="target"), Draw(1, source="previous"))
        return Plan("game", anchors=("target", "previous"), samples=drawn, feedback="table")

    def loss(self, batch: GameBatch) -> LossTerms:
        assert batch.table is not None
        first, second, _ = batch.completions
        gap = 2 * batch.table[:, 0, 1] - 1 - (batch.table[:, 0, 2] - batch.table[:, 1, 2])
        policy, target = (
            (first.sequence(name), second.sequence(name)) for name in ("policy", "target")
        )
        losses = online_ipo_loss(*policy, *target, preference_gap=gap, beta=1 / self.step)
        drift = (policy[0] + policy[1] - target[0] - target[1]).detach() / 2
        metrics = {"rewards/probabilities": batch.table[:, 0, 1], "kl/target_policy_k1": -drift}
        return LossTerms([Term("onpo", losses)], metrics)
