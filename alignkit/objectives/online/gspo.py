"""GSPO: group-relative advantages with one importance ratio per completion, the geometric mean of
its tokens' ratios.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from alignkit.batches import LossTerms, Plan, RolloutBatch
from alignkit.objectives.base import Objective
from alignkit.objectives.exploration import ExploringGroup
from alignkit.objectives.ratios import completion_ratio
from alignkit.objectives.rollout_base import ClipWidth, advantages_of, unspread
from alignkit.objectives.surrogates import ppo_loss
from alignkit.tensors import masked_mean


def gspo_loss(
    policy_logps: Tensor,
    behavior_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float | None = None,
    clip_high: float | None = None,
) -> Tensor:
    """max(-s A, -clip(s) A) per completion with s = exp(mean_t log
    w_t): [N, T] x 2, [N], [N, T] -> [N].

    The gradient flows through s. Zheng et al. 2025, arXiv:2507.18071, eq. 5 and 7.
    """
    logps = masked_mean(policy_logps, mask)
    old = masked_mean(behavior_logps, mask)
    return ppo_loss(logps, old, advantages, clip_low=clip_low, clip_high=clip_high)


class GSPO(ExploringGroup):
    """Group sequence policy optimisation (Zheng et al. 2025, arXiv:2507.18071). The mean ratio
    varies little, so the clip is a thousand times narrower than GRPO's. `aggregation` has nothing
    to do: a completion is one term.
    """

    paper: ClassVar[str] = "Zheng et al. 2025, arXiv:2507.18071, eq. 5 and 7"
    equation: ClassVar[str] = (
        "L = max(-s A, -clip(s) A), s = (pi/pi_old)(y)^(1/|y|); A = (score - group mean) / group std"
    )

    clip_low: ClipWidth | None = Field(
        3e-4, description="no gain from a ratio below 1 - this; null = off"
    )
    clip_high: ClipWidth | None = Field(
        4e-4, description="no gain from a ratio above 1 + this; null = off"
    )

    @property
    def plan(self) -> Plan:
        return self.exploring_plan()

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        exploring = {"entropy_weight": 0.1, "off_policy_threshold": 0.3}
        return [cls(), cls(clip_low=0.2, clip_high=0.3, scale_by_std=False, **exploring)]

    def loss(self, batch: RolloutBatch) -> LossTerms:
        values, metrics = self.completion_losses(batch)
        term = self.term("gspo", values, batch.tokens)
        return LossTerms([term, *self.entropy_terms(batch.tokens)], metrics)

    def completion_losses(self, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """`gspo_loss` of every completion [N], and the metrics of their ratios."""
        tokens = batch.tokens
        mask = tokens.mask
        logps = tokens.policy
        old = tokens.get("behavior")
        teaching, masked = self.teaching_advantages(batch)
        values = gspo_loss(logps, old, unspread(teaching, tokens), mask, **self.clip)

        own = unspread(advantages_of(batch), tokens)
        clipped = self.metrics(tokens, completion_ratio(tokens), own)
        return values, {**clipped, **masked}
