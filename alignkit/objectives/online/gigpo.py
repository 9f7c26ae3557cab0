"""Group-in-group policy optimisation: turns that were taken in the same state are compared too."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from alignkit.batches import RolloutBatch
from alignkit.credit import at_the_end
from alignkit.objectives.base import Objective, State
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.rollout_base import advantages_of
from alignkit.objectives.turn_credit import gigpo_advantages as gigpo_advantages


class GiGPO(GRPO):
    """Group-in-group policy optimisation (Feng et al. 2025, arXiv:2505.10978): GRPO for episodes of
    several turns.

    A turn in a state that no other turn of the group was taken in gets the episode's advantage
    alone. With `omega` above 0 the gradient is not that of E[score]: group sizes are random.
    """

    paper: ClassVar[str] = "Feng et al. 2025, arXiv:2505.10978, eqs. 3 to 9"
    equation: ClassVar[str] = (
        "GRPO's loss; A = (R - group mean) + omega (return of the turn - mean over its state)"
    )

    gamma: Annotated[float, Field(ge=0, le=1)] = Field(
        0.95, description="discount, per turn, of the rewards after a turn"
    )
    omega: NonNegativeFloat = Field(1.0, description="weight of the comparison of turns")
    scale_by_std: bool = Field(
        False, description="divide both parts by their standard deviations, as GRPO does"
    )

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(omega=0.5, gamma=1.0, scale_by_std=True, kl="k2")]

    @classmethod
    def limits(cls) -> Sequence[tuple[Objective, Objective]]:
        return [(cls(omega=0.0), GRPO(scale_by_std=False))]

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """The episode's advantage plus `omega` times the turn's, on the turn's own tokens. A
        completion of one turn was taken in the state of its prompt. A `risk` is about episodes.
        """
        mask = rollout.tokens.mask
        rewards = rollout.rewards
        turns = rollout.turns
        states = rollout.states
        if rewards is None or turns is None or states is None:
            rewards = at_the_end(rollout.scores, mask)
            turns = torch.where(mask, 0, -1)
            states = torch.zeros_like(turns)

        def parts(omega: float) -> Tensor:
            return gigpo_advantages(
                rewards,
                mask,
                turns,
                states,
                torch.arange(len(mask), device=mask.device),
                rollout.groups,
                gamma=self.gamma,
                omega=omega,
                normalise=self.scale_by_std,
            )

        advantages = parts(self.omega)
        if self.risk:  # the comparison of episodes is GRPO's
            by_episode = advantages_of(super().credit(rollout, state)[0])
            advantages = advantages - parts(0.0) + by_episode
        return replace(rollout, advantages=advantages.to(rollout.scores.dtype)), state
