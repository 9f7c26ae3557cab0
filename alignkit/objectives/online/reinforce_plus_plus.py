"""REINFORCE++: token rewards with the KL inside, whitened over the whole rollout instead of a value
head or groups.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import LossTerms, RolloutBatch
from alignkit.credit import alone, group_advantages, reward_to_go, shaped_rewards, whiten
from alignkit.kl import Direction, importance, k2
from alignkit.objectives.base import Objective, State, tilted
from alignkit.objectives.rollout_base import ClippedObjective, Credit, advantages_of, spread
from alignkit.objectives.surrogates import ppo_loss
from alignkit.tensors import masked_sum


class ReinforcePlusPlus(ClippedObjective):
    """REINFORCE++ (Hu et al. 2025, arXiv:2501.03262) and its variant with the prompt's other
    completions as baseline.
    """

    paper: ClassVar[str] = "Hu et al. 2025, arXiv:2501.03262"
    equation: ClassVar[str] = (
        "L = max(-w A, -clip(w) A); A = whitened sum_{s >= t} [-beta log pi_old/ref] + score"
    )

    beta: PositiveFloat = Field(
        0.01, description="reverse KL: in the reward, or (baseline group) k2 in the loss"
    )
    baseline: Literal["none", "group"] = Field(
        "none", description="group: minus the group's mean before whitening (-baseline)"
    )

    @property
    def kl_gradient(self) -> tuple[Credit, Direction] | None:
        return "sequence" if self.baseline == "none" else "token", "reverse"

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [
            cls(),
            cls(baseline="group", clip_low=0.6, clip_high=1.0, aggregation="constant", length=4),
        ]

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """Whitened over all tokens of the rollout: the reward still to come, or the score minus the
        group's mean. In the latter case completions alone in their group are set aside.
        """
        tokens = rollout.tokens
        if self.baseline == "none":
            rewards = shaped_rewards(
                rollout.scores.double(),
                tokens.log_ratio,
                tokens.mask,
                beta=self.beta,
                rewards=rollout.rewards,
            )
            credit = reward_to_go(rewards, tokens.mask)
            return replace(rollout, advantages=whiten(credit, tokens.mask)), state

        compared = tokens.mask & ~alone(rollout.groups).unsqueeze(-1)
        credit = spread(group_advantages(rollout.scores, rollout.groups), tokens)
        return replace(rollout, advantages=whiten(credit, compared)), state

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        logps = tokens.policy
        old = tokens.get("behavior")
        values = ppo_loss(logps, old, advantages_of(batch), **self.clip)
        metrics = self.metrics(tokens, importance(logps, old), advantages_of(batch))

        if self.baseline == "group":
            penalty = k2(logps - tokens.reference.detach())
            values = values + self.beta * penalty
            metrics["kl/policy_reference_k2"] = masked_sum(penalty, tokens.mask).detach()
        return LossTerms([self.term("reinforce_plus_plus", values, tokens)], metrics)

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """ref * exp(reward / beta), normalised, where the KL is whitened together with the score;
        with the group none.
        """
        return tilted(reward, reference, self.beta) if self.baseline == "none" else None
