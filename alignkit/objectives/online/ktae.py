"""Key-token advantage estimation: tokens of correct completions are worth more than others."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeFloat

from alignkit.batches import RolloutBatch
from alignkit.errors import ConfigError
from alignkit.objectives.base import Objective, State
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.token_credit import ktae_values as ktae_values


class KTAE(GRPO):
    """Key-token advantage estimation (Sun et al. 2025, arXiv:2505.16826): GRPO's advantage plus how
    strongly a token is associated with correct completions of its prompt.

    The last token of a turn gets no value of its own, since it is the end token.
    """

    paper: ClassVar[str] = "Sun et al. 2025, arXiv:2505.16826, eqs. 3 to 10"
    equation: ClassVar[str] = (
        "GRPO's loss; A_t = (score - group mean) / group std + weight value(y_t)"
    )

    token_weight: NonNegativeFloat = Field(1.0, description="weight of the values of tokens")
    threshold: float = Field(0.0, description="a completion is correct with a score above this")
    length_prior: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="b' of the term frequency; the paper's 0.5 favours the shorter side's tokens",
    )

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(token_weight=0.5, threshold=0.3, length_prior=0.5, scale_by_std=False)]

    @classmethod
    def limits(cls) -> Sequence[tuple[Objective, Objective]]:
        return [(cls(token_weight=0.0), GRPO())]

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """GRPO's advantage plus the token's value."""
        if rollout.ids is None:
            raise ConfigError("ktae: this rollout has no token ids; it needs them")
        mask = rollout.tokens.mask
        correct = rollout.scores > self.threshold
        values = ktae_values(
            rollout.ids, mask, correct, rollout.groups, length_prior=self.length_prior
        )

        # The end token of a turn, and of all, stands before another turn or before nothing.
        turns = torch.where(mask, 0, -1) if rollout.turns is None else rollout.turns
        following = torch.cat([turns[:, 1:], torch.full_like(turns[:, :1], -1)], dim=1)
        values = torch.where(following == turns, values, 0.0)

        credited, state = super().credit(rollout, state)
        assert credited.advantages is not None
        advantages = credited.advantages + self.token_weight * values.to(rollout.scores.dtype)
        return replace(credited, advantages=torch.where(mask, advantages, 0.0)), state
