"""What the objectives on sampled completions share: fields of the rollout, aggregation, metrics,
the exact KL statistic.

A metric `kl/a_b_estimator` is KL(a || b) in nats per completion: the first name is the distribution
that is averaged over.
"""

from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor

from alignkit.batches import Draw, LossTerms, Plan, RolloutBatch, Statistic, Term, TokenLogps
from alignkit.credit import entropic_advantages, gae, group_advantages, whiten
from alignkit.errors import ConfigError, ShapeError
from alignkit.kl import Direction, exact, k3_forward
from alignkit.objectives.base import Objective, State
from alignkit.objectives.entropic import clipped_entropic_loss
from alignkit.objectives.surrogates import value_loss
from alignkit.tensors import masked_mean, masked_sum

Aggregation = Literal["token_mean", "sequence_sum", "sequence_mean", "constant"]
Credit = Literal["sequence", "token"]
ClipWidth = Annotated[float, Field(gt=0)]
DualClip = Annotated[float, Field(gt=1)]
RISK = (
    "a of the utility -(1/a) log E exp(-a score): averse to spread above 0, seeking it below; "
    "0 = the mean"
)


class RolloutObjective(Objective):
    """Learns from completions that the policy samples itself; `credit` sees the global rollout."""

    # Whether `credit` reads more of the tokens than their masks; see `Plan`.
    credit_reads_policy: ClassVar[bool] = True

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
        samples: tuple[Draw, ...] = (Draw(),),
        scored: bool = True,
        without_anchor: tuple[str, ...] = (),
    ) -> Plan:
        """Completions of each prompt, as many as the recipe's `rollout.completions`, with a score
        unless `scored` is False; `epochs` x `minibatches` steps.
        """
        return Plan(
            "rollout",
            statistics=statistics or {},
            without_anchor=without_anchor,
            anchors=anchors,
            samples=samples,
            feedback="reward" if scored else "none",
            values=values,
            epochs=self.epochs,
            minibatches=self.minibatches,
            credit_reads_policy=self.credit_reads_policy,
        )

    def term(self, name: str, values: Tensor, tokens: TokenLogps, *, weight: float = 1.0) -> Term:
        """A loss term from `values` per token [N, T] (by
        `aggregation`) or per completion [N] (their mean).

        "token_mean": all tokens of the step alike; "sequence_sum", "sequence_mean": per completion,
        summed or averaged over its tokens; "constant": summed and divided by `length`. Different
        objectives, not scalings of one.
        """
        if values.dim() == 1:
            check_whole(tokens)
            return Term(name, values, "rows", weight)
        if self.aggregation == "token_mean":
            trained = torch.where(tokens.mask, values, values.new_zeros(()))
            return Term(name, trained, "tokens", weight)
        if self.aggregation == "sequence_mean":
            lengths = tokens.lengths if tokens.whole_lengths is None else tokens.whole_lengths
            means = masked_sum(values, tokens.mask) / lengths.clamp(min=1)
            return Term(name, means, "rows", weight)
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

    def metrics(self, tokens: TokenLogps, ratio: Tensor, advantages: Tensor) -> dict[str, Tensor]:
        """`ratio_metrics` and `clip_metrics` for importance `ratio` and `advantages`, both [N, T] or
        [N], and this objective's bounds.
        """
        clipped = clip_metrics(tokens, ratio, advantages, self.clip_low, self.clip_high)
        return {**ratio_metrics(tokens, ratio), **clipped}


class GroupObjective(ClippedObjective):
    """The completions of a prompt are each other's baseline, as in GRPO."""

    credit_reads_policy: ClassVar[bool] = False

    scale_by_std: bool = Field(True, description="divide by the group's standard deviation")
    risk: float = Field(0.0, description=RISK)

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """One advantage per completion: its score minus the group's mean, with `scale_by_std` over
        the standard deviation; exactly 0 in a group whose scores are all equal, or of which one
        completion alone has a score. With a `risk`, see `group_advantages`.
        """
        advantages = group_advantages(
            rollout.scores, rollout.groups, kind="mean", scale=self.scale_by_std, risk=self.risk
        )
        return replace(rollout, advantages=spread(advantages, rollout.tokens)), state


class ValueObjective(ClippedObjective):
    """A value head estimates the reward that is still to come at each token, as in PPO."""

    gamma: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="discount")
    lam: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="GAE lambda; below 1 trades bias for variance"
    )
    value_clip: ClipWidth | None = Field(
        0.2, description="how far the value head moves per rollout; null = off"
    )
    value_weight: NonNegativeFloat = Field(0.1, description="weight of the value loss")
    risk: float = Field(0.0, description=RISK)
    whiten_rewards: bool = Field(
        False, description="divide token rewards by their global standard deviation"
    )
    whiten_advantages: bool = Field(
        True, description="mean 0 and variance 1 over the global rollout"
    )

    @model_validator(mode="after")
    def _risk_adds_rewards_up(self) -> Self:
        if self.risk and (self.gamma < 1 or self.whiten_rewards):
            raise ValueError(
                f"risk {self.risk:g} is about the sum of the rewards as they are; "
                "set gamma to 1 and whiten_rewards to false"
            )
        return self

    def credited(self, rollout: RolloutBatch, rewards: Tensor, cost: Tensor) -> RolloutBatch:
        """The rollout with advantages and returns of token rewards [N, T] by GAE; with a `risk`, the
        advantages of the entropic utility. `cost` [N, T] is taken off the advantages as it is.
        """
        tokens = rollout.tokens
        mask = tokens.mask
        values = tokens.extras["values"]
        if self.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)

        advantages, returns = gae(rewards, values, mask, gamma=self.gamma, lam=self.lam)
        if self.risk:
            advantages = entropic_advantages(rewards, values, returns, mask, risk=self.risk)
        advantages = torch.where(mask, advantages - cost, 0.0)
        if self.whiten_advantages:
            advantages = whiten(advantages, mask)
        return replace(rollout, advantages=advantages, returns=returns, values=values)

    def value_terms(self, batch: RolloutBatch) -> LossTerms:
        """The value head's squared error (with a `risk`, its entropic relative), a term of weight
        `value_weight`.
        """
        values, returns = filled(batch, "values", "returns")
        tokens = batch.tokens
        new = tokens.extras["values"]
        if self.risk:
            errors = clipped_entropic_loss(
                new, values, returns, risk=self.risk, clip=self.value_clip
            )
        else:
            errors = value_loss(new, values, returns, clip=self.value_clip)
        term = self.term("value", errors, tokens, weight=self.value_weight)
        return LossTerms([term], {"value_error": errors.detach()[tokens.mask]})


def exact_kl(policy_logprobs: Tensor, anchor_logprobs: Tensor | None, labels: Tensor) -> Tensor:
    """The plan's statistic KL(policy || reference) over the whole
    vocabulary: [C, V], [C, V], [C] -> [C].
    """
    if anchor_logprobs is None:
        raise ShapeError(
            "exact_kl: the reference's log-probs over the vocabulary were not given; it needs them"
        )
    return exact(policy_logprobs, anchor_logprobs.detach(), "reverse")


def filled(
    batch: RolloutBatch, *names: Literal["advantages", "returns", "values", "weights"]
) -> list[Tensor]:
    """The named results of `credit`, [N, T] each. ConfigError where one is missing."""
    results = {name: getattr(batch, name) for name in names}
    missing = [name for name, value in results.items() if value is None]
    if missing:
        raise ConfigError(
            f"this rollout has no {', '.join(missing)}; "
            "call the objective's `credit` on the global rollout first"
        )
    return list(results.values())


def check_whole(tokens: TokenLogps) -> None:
    """Raise ConfigError where an episode was cut into several rows."""
    if tokens.cut:
        raise ConfigError(
            "objective: it weighs whole completions, and an episode was cut into several, by "
            "a chat template that rewrites history or by its environment's `context`; take "
            "another template or environment, or an objective with credit per token"
        )


def advantages_of(batch: RolloutBatch) -> Tensor:
    """The advantages [N, T] that `credit` left in the batch. ConfigError where it was not called."""
    return filled(batch, "advantages")[0]


def spread(values: Tensor, tokens: TokenLogps) -> Tensor:
    """One value per completion on each of its trained tokens, 0 elsewhere: [N] -> [N, T]."""
    return torch.where(tokens.mask, values.unsqueeze(-1), values.new_zeros(()))


def unspread(values: Tensor, tokens: TokenLogps) -> Tensor:
    """The inverse of `spread`: [N, T] -> [N]."""
    return masked_mean(values, tokens.mask)


def clip_metrics(
    tokens: TokenLogps, ratio: Tensor, advantages: Tensor, low: float | None, high: float | None
) -> dict[str, Tensor]:
    """Where a clip takes the gradient away, under TRL's names: a `ratio` below 1 - `low` whose
    advantage is negative, one above 1 + `high` whose advantage is positive, and either. All [N, T]
    or [N]; empty without a bound.
    """
    if low is None and high is None:
        return {}
    below = (ratio < (-torch.inf if low is None else 1 - low)) & (advantages < 0)
    above = (ratio > (torch.inf if high is None else 1 + high)) & (advantages > 0)
    clipped = {"low": below, "high": above, "region": below | above}
    return {
        f"clip_ratio/{side}_mean": _trained(where.to(ratio.dtype), tokens)
        for side, where in clipped.items()
    }


def _trained(values: Tensor, tokens: TokenLogps) -> Tensor:
    """Those of the trained tokens [M] for `values` [N, T]; values per completion [N] as they are.
    No gradient.
    """
    return values.detach()[tokens.mask] if values.dim() == 2 else values.detach()


def ratio_metrics(tokens: TokenLogps, ratio: Tensor) -> dict[str, Tensor]:
    """How far the policy is from the one that sampled, and from the reference. `ratio`: importance
    [N, T] or [N].
    """
    drift = k3_forward((tokens.policy - tokens.get("behavior")).detach())
    metrics = {
        "importance": _trained(ratio, tokens),
        "kl/behavior_policy_k3": masked_sum(drift, tokens.mask),
    }

    # What the head and the plan provide.
    if "entropy" in tokens.extras:
        metrics["entropy"] = tokens.extras["entropy"].detach()[tokens.mask]
    if "reference" in tokens.anchors:
        log_ratio = tokens.sequence("behavior") - tokens.sequence("reference")
        metrics["kl/behavior_reference_k1"] = log_ratio.detach()
    return metrics
