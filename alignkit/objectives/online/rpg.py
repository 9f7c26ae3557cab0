"""Regularised policy gradient: KL to the sampler in four forms, or exactly to a fixed reference."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from alignkit.batches import LossTerms, Plan, RolloutBatch
from alignkit.credit import Baseline, group_advantages, reward_to_go
from alignkit.kl import Direction, importance
from alignkit.objectives.base import Objective, State, tilted
from alignkit.objectives.rollout_base import (
    ClippedObjective,
    ClipWidth,
    Credit,
    DualClip,
    advantages_of,
    exact_kl,
    unspread,
)
from alignkit.objectives.surrogates import Divergence, Estimator, rpg_loss, rpg_weights


class RPG(ClippedObjective):
    """Regularised policy gradient (Zhang et al. 2025, arXiv:2505.17508).

    Anchor "behavior" is the paper's iterative reference: KL to the sampler. Anchor "reference"
    keeps a fixed one: exact KL(policy || reference) per token, and with `kl_credit: sequence` the
    later tokens' KL as a cost of this one.
    """

    paper: ClassVar[str] = "Zhang et al. 2025, arXiv:2505.17508, tables 1, 2 and 4, algorithm 2"
    equation: ClassVar[str] = (
        "L = -SG(w (A - beta log w)) log pi (behavior, reverse_ukl); -SG(w A) log pi + beta KL_t (fixed)"
    )
    kl_metric: ClassVar[str] = "kl/policy_reference_exact"

    beta: PositiveFloat = Field(0.05, description="strength of the KL")
    anchor: Literal["reference", "behavior"] = Field(
        "reference", description="KL to a fixed policy, or to the sampler"
    )
    divergence: Divergence = Field(
        "reverse_ukl", description="reverse = KL(policy || anchor), forward = KL(anchor || policy)"
    )
    estimator: Estimator = Field(
        "reinforce", description="how the gradient is formed; equal in the mean"
    )
    kl_credit: Credit = Field(
        "sequence",
        description="full gradient; token = partial, no credit for divergence caused later",
    )
    baseline: Baseline = Field(
        "leave_one_out", description="from the prompt's other completions; mean: the paper's"
    )
    clip_low: ClipWidth | None = Field(
        0.2, description="RPG-style clip: no push below 1 - this; null = off"
    )
    clip_high: ClipWidth | None = Field(
        0.28, description="RPG-style clip: no push above 1 + this; null = off"
    )
    dual_clip: DualClip | None = Field(
        10.0, description="largest ratio that counts where the advantage is negative"
    )

    @model_validator(mode="after")
    def _fixed_reference_is_reverse(self) -> Self:
        if self.anchor == "reference" and self.divergence.startswith("forward"):
            raise ValueError(
                f"divergence {self.divergence} needs its anchor's samples; use anchor: behavior, or reverse_ukl"
            )
        return self

    @property
    def plan(self) -> Plan:
        if self.anchor == "behavior":
            return self.rollout_plan(anchors=())
        return self.rollout_plan(statistics={"kl": exact_kl})

    @property
    def kl_gradient(self) -> tuple[Credit, Direction] | None:
        unbiased = self.anchor == "reference" and self.baseline != "mean"
        return (self.kl_credit, "reverse") if unbiased else None

    @property
    def surrogate(self) -> bool:
        return True

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        kinds = zip(get_args(Divergence), 2 * get_args(Estimator))
        forms = [cls(anchor="behavior", divergence=d, estimator=e) for d, e in kinds]
        return [
            cls(),
            cls(kl_credit="token", clip_high=1.0, clip_low=0.6, aggregation="constant", length=4),
            *forms,
        ]

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """Score minus baseline; against a fixed reference also minus beta times the KL of the
        tokens that follow.
        """
        tokens = rollout.tokens
        gain = rollout.scores.unsqueeze(-1).expand_as(tokens.policy)
        if self.anchor == "reference" and self.kl_credit == "sequence":
            kl = tokens.extras["kl"].double()
            own = kl.where(tokens.mask, kl.new_zeros(()))
            gain = gain - self.beta * (reward_to_go(kl, tokens.mask) - own)
        gain = group_advantages(gain, rollout.groups, kind=self.baseline)
        return replace(rollout, advantages=gain.where(tokens.mask, gain.new_zeros(()))), state

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        logps = tokens.policy
        old = tokens.get("behavior")
        advantages = advantages_of(batch)

        # The theorem's form: one ratio and one advantage per completion.
        fixed = self.anchor == "reference"
        if self.kl_credit == "sequence" and not fixed:
            logps = tokens.sequence()
            old = tokens.sequence("behavior")
            advantages = unspread(advantages, tokens)

        kl: dict[str, Any] = {"beta": 0.0 if fixed else self.beta, "divergence": self.divergence}
        values = rpg_loss(
            logps,
            old,
            advantages,
            estimator=self.estimator,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            **kl,
        )
        terms = [self.term("policy", values, tokens)]
        weights = rpg_weights(logps, old, advantages, **kl)
        metrics = self.metrics(tokens, importance(logps, old), weights)

        # Against a fixed reference the KL is a term of its own, exact at every token.
        if fixed:
            terms.append(self.term("kl", tokens.extras["kl"], tokens, weight=self.beta))
            metrics[self.kl_metric] = tokens.sequence("kl").detach()
        return LossTerms(terms, metrics)

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """ref * exp(reward / beta), normalised, for a fixed reference with full credit."""
        if self.kl_gradient != ("sequence", "reverse"):
            return None
        return tilted(reward, reference, self.beta)
