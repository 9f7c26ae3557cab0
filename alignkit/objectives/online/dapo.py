"""DAPO: GRPO with a higher upper clip, one weight for every token of the step, and nothing from
groups that agree.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from alignkit.batches import RolloutBatch
from alignkit.credit import constant_groups
from alignkit.objectives.base import Objective, State
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.rollout_base import Aggregation, ClipWidth


def overlong_penalty(lengths: Tensor, *, limit: int, buffer: int) -> Tensor:
    """0 up to `limit` - `buffer` tokens, linearly down to -1 at `limit`, -1 beyond: [N] -> [N].

    Yu et al. 2025, arXiv:2503.14476, eq. 13.
    """
    return ((limit - buffer - lengths) / buffer).clamp(-1, 0)


class DAPO(GRPO):
    """DAPO (Yu et al. 2025, arXiv:2503.14476). Groups whose scores are all equal, and groups of one,
    are left out of the token mean; new prompts are not drawn in their place.
    """

    paper: ClassVar[str] = "Yu et al. 2025, arXiv:2503.14476"
    equation: ClassVar[str] = (
        "L = max(-w A, -clip(w) A), mean over all tokens of groups that differ; A = (score - mean) / std"
    )

    beta: NonNegativeFloat = Field(
        0.0, description="strength of the KL to the reference, in the loss; 0 = no reference"
    )
    clip_high: ClipWidth | None = Field(
        0.28, description="no gain from a ratio above 1 + this; null = off"
    )
    aggregation: Aggregation = Field(
        "token_mean", description="token_mean: long completions weigh more"
    )
    drop_constant: bool = Field(
        True, description="leave groups without a difference out of the mean"
    )
    overlong_limit: PositiveInt | None = Field(
        None, description="tokens from which on a score loses 1; null = off"
    )
    overlong_buffer: PositiveInt = Field(
        4, description="tokens before that limit over which the penalty grows"
    )

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        wide = {"clip_low": 0.6, "clip_high": 1.0, "dual_clip": 3.0}
        overlong = {"overlong_limit": 6, "overlong_buffer": 3}
        return [cls(), cls(beta=0.1, aggregation="constant", length=4, **overlong, **wide)]

    @classmethod
    def limits(cls) -> Sequence[tuple[Objective, Objective]]:
        return [(cls(clip_high=0.2), GRPO(beta=0.0, aggregation="token_mean"))]

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """GRPO's on scores with the overlong penalty; what is left after dropping groups is scaled
        up to the same mean.
        """
        lengths = rollout.tokens.lengths
        if self.overlong_limit is not None:
            limits = {"limit": self.overlong_limit, "buffer": self.overlong_buffer}
            scores = rollout.scores + overlong_penalty(lengths.double(), **limits)
            rollout = replace(rollout, scores=scores)

        credited, state = super().credit(rollout, state)
        if not self.drop_constant or credited.advantages is None:
            return credited, state

        # The loop divides by the count of all completions; this makes it that of the ones left.
        counts = lengths if self.aggregation == "token_mean" else torch.ones_like(lengths)
        weights = counts.double()
        differing = weights[~constant_groups(rollout.scores, rollout.groups)].sum()
        scale = weights.sum() / differing.clamp(min=1)
        return replace(credited, advantages=credited.advantages * scale), state
