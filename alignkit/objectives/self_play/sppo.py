"""SPPO: multiplicative weights by regression."""

from typing import ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import Draw, GameBatch, LossTerms, Plan, Term
from alignkit.objectives.base import Objective
from alignkit.tensors import check_same_shape


def sppo_loss(
    policy_logps: Tensor, target_logps: Tensor, win_rate: Tensor, *, step: float
) -> Tensor:
    """(log pi/target - step (win rate - 1/2))^2 per completion: [B] x 3 -> [B]; the win rate is
    that against the target.

    Wu et al. 2024, arXiv:2405.00675, eq. 4 with log Z = step / 2. log Z is a little larger, so that
    the minimiser over normalised policies is near target * exp(step * win rate), the step of
    multiplicative weights, and not equal to it.
    """
    check_same_shape(policy_logps=policy_logps, target_logps=target_logps, win_rate=win_rate)
    return (policy_logps - target_logps.detach() - step * (win_rate.detach() - 0.5)) ** 2


class SPPO(Objective):
    """Self-play preference optimisation (Wu et al. 2024, arXiv:2405.00675): every sample's win rate
    among those of its prompt.

    Samples and opponents come from the target, the policy of the last iteration (the recipe's
    `target` section: a copy every k steps). There is no reference: the average of the iterates
    solves the game without a KL, the last one may go in circles. Each sample also meets itself, a
    tie, as in the paper's code.
    """

    paper: ClassVar[str] = "Wu et al. 2024, arXiv:2405.00675, eq. 4"
    equation: ClassVar[str] = (
        "L = (log pi/target(y) - step (mean over y' of P(y > y') - 1/2))^2, y, y' ~ target"
    )

    step: PositiveFloat = Field(
        1.0,
        description="step of multiplicative weights: the target log-ratio of a win rate of 1 is step / 2",
    )

    @property
    def plan(self) -> Plan:
        return Plan("game", anchors=("target",), samples=(Draw(source="target"),), feedback="table")

    def loss(self, batch: GameBatch) -> LossTerms:
        terms = []
        for k, tokens in enumerate(batch.completions):
            losses = sppo_loss(
                tokens.sequence(), tokens.sequence("target"), batch.preference[:, k], step=self.step
            )
            terms.append(Term("sppo", losses, weight=1 / len(batch.completions)))
        return LossTerms(terms, {"rewards/probabilities": batch.preference.amax(-1)})
