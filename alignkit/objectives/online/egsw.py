"""Entropy-guided sequence weighting: within a group, completions count by advantage and entropy."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from alignkit.batches import RolloutBatch
from alignkit.errors import ConfigError, ShapeError
from alignkit.objectives.base import Objective, State
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.rollout_base import advantages_of
from alignkit.tensors import check_same_shape, masked_mean


@torch.no_grad()
def egsw_weights(
    advantages: Tensor,
    entropy: Tensor,
    mask: Tensor,
    groups: Tensor,
    *,
    alpha: float,
    temperature: float,
    by_token: bool = True,
) -> Tensor:
    """Weight of every own token within its group: [N, T] x 3, [N] int64 -> [N, T].

    The t-th own tokens of a group's completions that are at least t tokens long share weights that
    sum to 1: softmax((advantage + alpha entropy) / temperature), entropy in nats. `by_token=False`
    takes the mean entropy of each completion. 0 outside the mask. ConfigError for an alpha below 0
    or a temperature that is not above 0; ShapeError for shapes that do not fit.

    Source: Vanlioglu 2025, arXiv:2503.22456.
    """
    check_same_shape(advantages=advantages, entropy=entropy, mask=mask)
    if groups.shape != mask.shape[:1]:
        raise ShapeError(f"groups has the shape {list(groups.shape)}; give one entry per row")
    if not (alpha >= 0 and temperature > 0):
        raise ConfigError(
            f"alpha is {alpha} and temperature {temperature}; they should be at least 0 and above 0"
        )
    weights = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    if not bool(mask.any()):
        return weights
    measured = entropy.double()
    if not by_token:
        measured = masked_mean(measured, mask).unsqueeze(-1).expand_as(measured)
    score = ((advantages.double() + alpha * measured) / temperature)[mask]

    # One set per group and number of the own token: the completions that are still going on.
    number = mask.cumsum(-1)[mask]
    group = groups.unsqueeze(-1).expand_as(mask)[mask]
    sets, index = torch.stack([group, number], dim=1).unique(dim=0, return_inverse=True)
    highest = score.new_full((len(sets),), -torch.inf).scatter_reduce_(0, index, score, "amax")
    exponential = (score - highest[index]).exp()
    total = score.new_zeros(len(sets)).index_add_(0, index, exponential)
    weights[mask] = exponential / total[index]
    return weights


class EGSW(GRPO):
    """Entropy-guided sequence weighting (Vanlioglu 2025, arXiv:2503.22456): GRPO in which the
    completions of a group count by advantage and entropy, not all alike.

    A weight takes the place of 1 / (completions that are still going on), so that an infinite
    temperature is GRPO. At a low one, completions with a low advantage hardly teach anything.
    """

    paper: ClassVar[str] = "Vanlioglu 2025, arXiv:2503.22456"
    equation: ClassVar[str] = (
        "GRPO's loss with A_t = G w_t A; w_t = softmax over the group of (A + alpha H_t) / P"
    )

    credit_reads_policy: ClassVar[bool] = True  # its entropy

    alpha: NonNegativeFloat = Field(0.5, description="how much a nat of entropy counts")
    temperature: PositiveFloat | None = Field(
        1.5, description="P: high, and all count alike; null = infinite, which is GRPO"
    )
    entropy_of: Literal["token", "completion"] = Field(
        "token", description="the entropy at each token, or the completion's mean"
    )

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(entropy_of="completion", alpha=0.2, temperature=3.0, kl="k2")]

    @classmethod
    def limits(cls) -> Sequence[tuple[Objective, Objective]]:
        return [(cls(temperature=None), GRPO())]

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """GRPO's advantages times the weights."""
        credited, state = super().credit(rollout, state)
        if self.temperature is None:
            return credited, state
        tokens = rollout.tokens
        advantages = advantages_of(credited)
        weights = egsw_weights(
            advantages,
            tokens.extras["entropy"],
            tokens.mask,
            rollout.groups,
            alpha=self.alpha,
            temperature=self.temperature,
            by_token=self.entropy_of == "token",
        )

        # Where all are alike, a weight is 1 / (completions that are still going on).
        alike = torch.zeros_like(advantages)
        shares = egsw_weights(alike, alike, tokens.mask, rollout.groups, alpha=0.0, temperature=1.0)
        factors = torch.where(tokens.mask, weights / shares, 0.0)
        return replace(credited, advantages=(advantages * factors).to(advantages.dtype)), state
