"""REINFORCE with a leave-one-out baseline."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import LossTerms, RolloutBatch
from alignkit.credit import group_advantages
from alignkit.kl import Direction, importance
from alignkit.objectives.base import Objective, State
from alignkit.objectives.entropic import entropic_optimum
from alignkit.objectives.rollout_base import (
    RISK,
    ClippedObjective,
    Credit,
    advantages_of,
    spread,
    unspread,
)
from alignkit.objectives.surrogates import ppo_loss
from alignkit.tensors import masked_sum


def rloo_loss(
    policy_logps: Tensor,
    behavior_logps: Tensor,
    advantages: Tensor,
    *,
    clip_low: float | None = None,
    clip_high: float | None = None,
) -> Tensor:
    """Clipped surrogate on the ratio of whole completions: [N] x 3 -> [N]. Ahmadian et al. 2024,
    arXiv:2402.14740, eq. 7.
    """
    return ppo_loss(
        policy_logps, behavior_logps, advantages, clip_low=clip_low, clip_high=clip_high
    )


class RLOO(ClippedObjective):
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740): unbiased, no value head,
    one action per completion.
    """

    paper: ClassVar[str] = "Ahmadian et al. 2024, arXiv:2402.14740, eq. 7"
    equation: ClassVar[str] = (
        "L = -w (R_i - mean of the others' R), R = score - beta sum_t log pi_old/ref, clipped"
    )

    beta: PositiveFloat = Field(
        0.05, description="reverse KL, KL(policy || reference), in the score"
    )
    risk: float = Field(0.0, description=RISK)

    @property
    def kl_gradient(self) -> tuple[Credit, Direction] | None:
        return "sequence", "reverse"

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(clip_low=0.9, clip_high=2.0), cls(risk=-1.5)]

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """Score minus beta times the completion's sampled KL (k1), minus the other completions'
        mean of the same. With a `risk`, the scores are compared with the others' certainty
        equivalent, and the KL with its mean.
        """
        tokens = rollout.tokens
        groups = rollout.groups
        cost = -self.beta * masked_sum(tokens.log_ratio.double(), tokens.mask)
        if self.risk:
            gains = group_advantages(rollout.scores, groups, kind="leave_one_out", risk=self.risk)
            advantages = gains + group_advantages(cost, groups, kind="leave_one_out")
        else:
            advantages = group_advantages(rollout.scores + cost, groups, kind="leave_one_out")
        return replace(rollout, advantages=spread(advantages, tokens)), state

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        logps = tokens.sequence()
        old = tokens.sequence("behavior")
        advantages = unspread(advantages_of(batch), tokens)
        values = rloo_loss(logps, old, advantages, **self.clip)
        metrics = self.metrics(tokens, importance(logps, old), advantages)
        return LossTerms([self.term("rloo", values, tokens)], metrics)

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """ref * exp(reward / beta), normalised; with a risk, that of large groups."""
        return entropic_optimum(reward, reference, beta=self.beta, risk=self.risk)
