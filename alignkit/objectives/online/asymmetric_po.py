"""Asymmetric policy optimisation: correct and wrong completions are held back differently."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from alignkit.batches import RolloutBatch
from alignkit.credit import group_baseline
from alignkit.objectives.base import Objective, State
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.rollout_base import advantages_of, filled, spread


@torch.no_grad()
def overlong_factors(lengths: Tensor, correct: Tensor, groups: Tensor, *, base: float) -> Tensor:
    """2 - base^(-D) for completions that are D tokens longer than the mean correct one of their
    group, 1 for shorter ones and where none is correct: [N], [N] bool, [N] int64 -> [N] float64.
    """
    right = correct.double()
    share = group_baseline(right, groups)
    total = group_baseline(lengths.double() * right, groups)
    longer = lengths.double() - total / share.clamp(min=1e-12)
    return torch.where((share > 0) & (longer > 0), 2 - base ** (-longer.clamp(min=0)), 1.0)


class AsymmetricPO(GRPO):
    """Asymmetric policy optimisation (Hong et al. 2025, arXiv:2506.21655): GRPO in which the KL of
    good completions depends on how hard their prompt is, and bad ones that are longer than the
    correct ones count more.

    Hypothesis: the paper's map from difficulty to KL is not given; here it is the pass rate itself,
    so that the KL of a good completion is weak where the prompt is hard.
    """

    paper: ClassVar[str] = "Hong et al. 2025, arXiv:2506.21655"
    equation: ClassVar[str] = (
        "GRPO's loss; A > 0: beta times the pass rate; A < 0: A (2 - base^-D), D tokens overlong"
    )

    difficulty_kl: Literal["off", "linear"] = Field(
        "linear", description="linear: the KL of completions with A > 0 times the pass rate"
    )
    length_base: Annotated[float, Field(ge=1)] = Field(
        1.00001, description="base of the overlength factor, as published; 1 = off"
    )
    threshold: float = Field(0.0, description="a completion is correct with a score above this")

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(length_base=1.2), cls(difficulty_kl="off", threshold=0.3, length_base=1.5)]

    @classmethod
    def limits(cls) -> Sequence[tuple[Objective, Objective]]:
        return [(cls(difficulty_kl="off", length_base=1.0), GRPO())]

    @property
    def kl_gradient(self) -> None:
        """Nothing: it is not the KL of the policy, but one that is weighted by completion."""
        return None

    def kl_weight(self, batch: RolloutBatch) -> float | Tensor:
        """Beta times what `credit` has left in the batch."""
        (weights,) = filled(batch, "weights")
        return self.beta * weights

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """GRPO's advantages, those below 0 times the overlength factor; weights of the KL."""
        tokens = rollout.tokens
        credited, state = super().credit(rollout, state)
        advantages = advantages_of(credited)
        correct = rollout.scores > self.threshold

        factors = overlong_factors(
            tokens.lengths, correct, rollout.groups, base=self.length_base
        ).unsqueeze(-1)
        advantages = torch.where(advantages < 0, advantages * factors, advantages)

        weights = torch.ones_like(advantages)
        if self.difficulty_kl == "linear":
            passed = spread(group_baseline(correct.double(), rollout.groups), tokens)
            weights = torch.where(advantages > 0, passed.to(weights.dtype), weights)
        advantages = advantages.to(rollout.scores.dtype)
        return replace(credited, advantages=advantages, weights=weights), state
