"""What the objectives on sampled completions share: fields of the rollout, aggregation, metrics,
the exact KL statistic.

A metric `kl/a_b_estimator` is KL(a || b) in nats per completion: the first name is the distribution
that is averaged over.
"""

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from alignkit.batches import Draw, Plan, RolloutBatch, Statistic, Term, TokenLogps
from alignkit.credit import group_advantages
from alignkit.errors import ConfigError, ShapeError
from alignkit.kl import Direction, exact, k3_forward
from alignkit.objectives.base import Objective
from alignkit.tensors import masked_mean, masked_sum

Aggregation = Literal["token_mean", "sequence_sum", "sequence_mean", "constant"]
Credit = Literal["sequence", "token"]
ClipWidth = Annotated[float, Field(gt=0)]
DualClip = Annotated[float, Field(gt=1)]


class RolloutObjective(Objective):
    """Learns from completions that the policy samples itself; `credit` sees the global rollout."""

    epochs: PositiveInt = Field(1, description="passes over one rollout")
    minibatches: PositiveInt = Field(1, description="optimiser steps per pass")
    aggregation: Aggregation = Field(
        "token_mean", description="how token losses become one number: what lengths weigh"
    )
    length: PositiveInt | None = Field(
        None, description="the divisor of aggregation `constant`, e.g. rollout.max_new_tokens"
    )

    @property
    def kl_gradient(self) -> tuple[Credit, Direction] | None:
        """Which KL(policy, reference) the penalty's gradient belongs to on-policy, up to a positive
        scale; None claims nothing.

        "sequence" is the full gradient; "token" the partial one, which gives a token no credit for
        divergence it causes later. The conformance suite compares the claim with what enumeration
        delivers.
        """
        return None

    @property
    def plan(self) -> Plan:
        return self.rollout_plan()

    def rollout_plan(
        self,
        *,
        statistics: dict[str, Statistic] | None = None,
        anchors: tuple[str, ...] = ("reference",),
        values: bool = False,
    ) -> Plan:
        """Scored completions of each prompt, as many as the recipe's `rollout.completions`;
        `epochs` x `minibatches` steps.
        """
        found = statistics or {}
        rhythm = (self.epochs, self.minibatches)
        return Plan("rollout", found, anchors, (Draw(),), "reward", values, *rhythm)

    def term(self, name: str, values: Tensor, tokens: TokenLogps, *, weight: float = 1.0) -> Term:
        """A loss term from `values` per token [N, T] (by `aggregation`) or per completion [N]
        (their mean).

        "token_mean": all tokens of the step alike; "sequence_sum", "sequence_mean": per completion,
        summed or averaged over its tokens; "constant": summed and divided by `length`. Different
        objectives, not scalings of one.
        """
        if values.dim() == 1:
            return Term(name, values, "rows", weight)
        if self.aggregation == "token_mean":
            return Term(
                name, torch.where(tokens.mask, values, values.new_zeros(())), "tokens", weight
            )
        if self.aggregation == "sequence_mean":
            return Term(name, masked_mean(values, tokens.mask), "rows", weight)
        if self.aggregation == "constant" and self.length is None:
            raise ConfigError(
                "objective: aggregation 'constant' divides by `length`; set it, e.g. to rollout.max_new_tokens"
            )
        divisor = self.length if self.aggregation == "constant" and self.length else 1
        return Term(name, masked_sum(values, tokens.mask) / divisor, "rows", weight)


class ClippedObjective(RolloutObjective):
    """Gains nothing from a ratio of policy to sampler outside of bounds, as in PPO."""

    clip_low: ClipWidth | None = Field(
        0.2, description="no gain from a ratio below 1 - this; null = off"
    )
    clip_high: ClipWidth | None = Field(
        0.2, description="no gain from a ratio above 1 + this; null = off"
    )

    @property
    def clip(self) -> dict[str, float | None]:
        """The bounds, as losses take them."""
        return {"clip_low": self.clip_low, "clip_high": self.clip_high}


def exact_kl(policy_logprobs: Tensor, anchor_logprobs: Tensor | None, labels: Tensor) -> Tensor:
    """The plan's statistic KL(policy || reference) over the whole vocabulary: [C, V], [C, V], [C]
    -> [C].
    """
    if anchor_logprobs is None:
        raise ShapeError(
            "exact_kl: the reference's log-probs over the vocabulary were not given; it needs them"
        )
    return exact(policy_logprobs, anchor_logprobs.detach(), "reverse")


def filled(batch: RolloutBatch, *names: Literal["advantages", "returns", "values"]) -> list[Tensor]:
    """The named results of `credit`, [N, T] each. ConfigError where one is missing."""
    found = [(name, getattr(batch, name)) for name in names]
    missing = [name for name, value in found if value is None]
    if missing:
        raise ConfigError(
            f"this rollout has no {', '.join(missing)}; call the objective's `credit` on the global rollout first"
        )
    return [value for _, value in found]


def spread(values: Tensor, tokens: TokenLogps) -> Tensor:
    """One value per completion on each of its trained tokens, 0 elsewhere: [N] -> [N, T]."""
    return torch.where(tokens.mask, values.unsqueeze(-1), values.new_zeros(()))


def unspread(values: Tensor, tokens: TokenLogps) -> Tensor:
    """The inverse of `spread`: [N, T] -> [N]."""
    return masked_mean(values, tokens.mask)


def grouped(rollout: RolloutBatch, *, scale: bool) -> RolloutBatch:
    """The rollout with one advantage per completion: score minus the group's mean, with `scale`
    over its standard deviation; exactly 0 in a group whose scores are all equal.
    """
    advantages = group_advantages(rollout.scores, rollout.groups, kind="mean", scale=scale)
    return replace(rollout, advantages=spread(advantages, rollout.tokens))


def ratio_metrics(
    tokens: TokenLogps, ratio: Tensor, low: float | None, high: float | None
) -> dict[str, Tensor]:
    """How far the policy is from the one that sampled, and from the reference. `ratio`: importance
    [N, T] or [N].
    """
    used = ratio.detach()[tokens.mask] if ratio.dim() == 2 else ratio.detach()
    outside = (used < 1 - (torch.inf if low is None else low)) | (
        used > 1 + (torch.inf if high is None else high)
    )
    drift = k3_forward((tokens.policy - tokens.get("behavior")).detach())
    metrics = {
        "importance": used,
        "clip_ratio/region_mean": outside.to(used.dtype),
        "kl/behavior_policy_k3": masked_sum(drift, tokens.mask),
    }
    if "entropy" in tokens.extras:
        metrics["entropy"] = tokens.extras["entropy"].detach()[tokens.mask]
    if "reference" in tokens.anchors:
        metrics["kl/behavior_reference_k1"] = (
            tokens.sequence("behavior") - tokens.sequence("reference")
        ).detach()
    return metrics
