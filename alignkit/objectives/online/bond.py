"""BOND: the law of the best of n samples, learned by one that samples once."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor

from alignkit.batches import Draw, LossTerms, Plan, RolloutBatch
from alignkit.credit import Baseline, group_baseline
from alignkit.kl import importance
from alignkit.objectives.base import Objective, State, best_of_n_logprobs
from alignkit.objectives.online.raft import kept_shares
from alignkit.objectives.online.rloo import rloo_loss
from alignkit.objectives.rollout_base import (
    RolloutObjective,
    advantages_of,
    ratio_metrics,
    spread,
    unspread,
)


class BOND(RolloutObjective):
    """Best-of-n distillation (Sessa et al. 2024, arXiv:2407.14622): the Jeffreys divergence to the
    best of `n` samples of an anchor that follows the policy (the recipe's `target`, an EMA).

    `j_bond` is the paper's algorithm 2, whose reward is a stand-in for the quantile; `quantile`
    estimates it by the share of the anchor's samples that are no better.
    """

    paper: ClassVar[str] = "Sessa et al. 2024, arXiv:2407.14622, algorithms 1 and 2"
    equation: ClassVar[str] = (
        "L = -(1 - b) log pi(best of n of the anchor) - w SG(b r - (b + gamma) log pi/anchor) "
        "log pi(y)"
    )

    n: Annotated[int, Field(ge=2)] = Field(2, description="samples of the anchor for each prompt")
    mixture: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="b: 0 imitates the best sample, 1 is policy gradient alone"
    )
    gamma: NonNegativeFloat = Field(0.0, description="further KL to the anchor: smaller steps")
    reward: Literal["j_bond", "quantile"] = Field(
        "j_bond", description="of own samples: -log 16 below both anchor's; (n - 1) log quantile"
    )
    baseline: Baseline = Field("leave_one_out", description="from the prompt's own samples")

    @model_validator(mode="after")
    def _two_anchors(self) -> Self:
        if self.reward == "j_bond" and self.n != 2:
            raise ValueError("j_bond is made for n = 2; with more samples take reward: quantile")
        return self

    @property
    def plan(self) -> Plan:
        samples = (Draw(), Draw(self.n, source="target"))
        return self.rollout_plan(anchors=("target",), samples=samples)

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(gamma=0.3), cls(reward="quantile", n=3, mixture=0.3, baseline="mean")]

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """Own completions get their gain over the baseline, the anchor's the share of the best that
        each is. Both are scaled so that the step's means are means over prompts.
        """
        anchored = rollout.drawn_by(1)
        own = ~anchored
        groups = rollout.groups
        same = groups.unsqueeze(0) == groups.unsqueeze(1)

        tokens = rollout.tokens
        drift = tokens.sequence().double() - tokens.sequence("target").double()
        reward = self.mixture * self._reward(rollout.scores, same & anchored)
        total = (reward - (self.mixture + self.gamma) * drift)[own]
        gain = total - group_baseline(total, groups[own], kind=self.baseline)

        weights = torch.zeros_like(rollout.scores, dtype=torch.float64)
        weights[own] = gain / (same & own).sum(-1)[own]
        shares = kept_shares(rollout.scores[anchored], groups[anchored], 1)
        weights[anchored] = (1 - self.mixture) * shares.double()
        return replace(rollout, advantages=spread(weights * same.sum(-1), tokens)), state

    def _reward(self, scores: Tensor, anchors: Tensor) -> Tensor:
        """Of each completion, from the anchor's samples of its prompt: scores [N], who they are
        [N, N] -> [N] in nats.
        """
        if self.reward == "j_bond":
            lowest = torch.where(anchors, scores, torch.inf).amin(-1)
            return -math.log(16) * (scores < lowest).double()

        no_better = (anchors & (scores.unsqueeze(0) <= scores.unsqueeze(1))).sum(-1).double()
        quantile = no_better / anchors.sum(-1).clamp(min=1)
        return (self.n - 1) * quantile.clamp(min=0.5 / self.n).log()

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        anchored = batch.drawn_by(1)
        policy = tokens.sequence()
        old = tokens.sequence("behavior")
        weights = unspread(advantages_of(batch), tokens)

        zero = policy.new_zeros(())
        gradient = torch.where(anchored, zero, rloo_loss(policy, old, weights))
        imitation = torch.where(anchored, -weights * policy, zero)
        terms = [self.term("policy", gradient, tokens), self.term("best", imitation, tokens)]

        own = tokens.select((~anchored).nonzero()[:, 0])
        metrics = ratio_metrics(own, importance(policy, old)[~anchored])
        drift = own.sequence("behavior") - own.sequence("target")
        metrics["kl/behavior_target_k1"] = drift.detach()
        return LossTerms(terms, metrics)

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """The best of `n` samples of the anchor, for a fixed anchor and exact quantiles. None for
        j_bond's stand-in and with a further KL, except for imitation alone.
        """
        exact = self.mixture == 0 or (self.reward == "quantile" and self.gamma == 0)
        return best_of_n_logprobs(reference, reward, self.n) if exact else None
