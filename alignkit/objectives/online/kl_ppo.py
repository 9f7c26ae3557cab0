"""KL-penalised proximal policy optimisation: the RLHF classic."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from alignkit.batches import LossTerms, Plan, RolloutBatch
from alignkit.credit import adapt_beta, gae, shaped_rewards, whiten
from alignkit.kl import Direction, importance
from alignkit.objectives.base import Objective, State
from alignkit.objectives.rollout_base import (
    ClippedObjective,
    ClipWidth,
    Credit,
    DualClip,
    filled,
    ratio_metrics,
)
from alignkit.objectives.surrogates import ppo_loss, value_loss
from alignkit.tensors import masked_sum


class KLPPO(ClippedObjective):
    """PPO on rewards with the KL inside (Ziegler et al. 2019, arXiv:1909.08593; Ouyang et al. 2022,
    arXiv:2203.02155).
    """

    paper: ClassVar[str] = (
        "Ziegler et al. 2019, arXiv:1909.08593, eq. 2; Schulman et al. 2017, arXiv:1707.06347, eq. 7"
    )
    equation: ClassVar[str] = (
        "maximise E[score] - beta KL(policy || reference); rollout k1 in the reward, GAE, clipped ratio"
    )

    beta: PositiveFloat = Field(
        0.05, description="reverse KL, KL(policy || reference); the start value with kl_target"
    )
    kl_target: PositiveFloat | None = Field(
        None, description="adapt beta towards this KL in nats per completion; null = fixed"
    )
    kl_horizon: PositiveFloat = Field(
        10_000, description="adaptive beta: n completions change it by at most 0.2 n / this"
    )
    kl_credit: Credit = Field(
        "sequence",
        description="full gradient; token = partial, no credit for divergence caused later",
    )
    gamma: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="discount")
    lam: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="GAE lambda; below 1 trades bias for variance"
    )
    dual_clip: DualClip | None = Field(
        None, description="largest ratio that counts where the advantage is negative"
    )
    value_clip: ClipWidth | None = Field(
        0.2, description="how far the value head moves per rollout; null = off"
    )
    value_weight: NonNegativeFloat = Field(0.1, description="weight of the value loss")
    whiten_rewards: bool = Field(
        False, description="divide token rewards by their global standard deviation"
    )
    whiten_advantages: bool = Field(
        True, description="mean 0 and variance 1 over the global rollout"
    )

    @property
    def plan(self) -> Plan:
        return self.rollout_plan(values=True)

    @property
    def kl_gradient(self) -> tuple[Credit, Direction] | None:
        return (
            (self.kl_credit, "reverse")
            if self.gamma == self.lam == 1 and not self.whiten_rewards
            else None
        )

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        wide = {
            "clip_low": 0.6,
            "clip_high": 1.0,
            "dual_clip": 3.0,
            "value_clip": 0.5,
            "aggregation": "sequence_mean",
        }
        other = cls(
            whiten_rewards=True, gamma=0.9, lam=0.9, kl_credit="token", kl_target=0.6, **wide
        )
        return [cls(), cls(aggregation="constant", length=4), other]

    def init_state(self) -> State:
        return {"beta": torch.tensor(self.beta, dtype=torch.float64)}

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """KL-shaped rewards, GAE, whitening; with `kl_target` the next coefficient. Needs `values`
        among the extras.
        """
        tokens = rollout.tokens
        beta = state["beta"].to(rollout.scores)
        kl = tokens.log_ratio
        values = tokens.extras["values"]
        shaped = self.kl_credit == "sequence"
        rewards = shaped_rewards(rollout.scores, kl, tokens.mask, beta=beta if shaped else 0.0)
        if self.whiten_rewards:
            rewards = whiten(rewards, tokens.mask, shift_mean=False)
        advantages, returns = gae(rewards, values, tokens.mask, gamma=self.gamma, lam=self.lam)
        if not shaped:
            advantages = torch.where(tokens.mask, advantages - beta * kl, 0.0)
        if self.whiten_advantages:
            advantages = whiten(advantages, tokens.mask)
        if self.kl_target is not None:
            mean = masked_sum(kl, tokens.mask).mean()
            samples = len(kl)
            state = {
                "beta": adapt_beta(
                    beta, mean, target=self.kl_target, horizon=self.kl_horizon, samples=samples
                )
            }
        return replace(rollout, advantages=advantages, returns=returns, values=values), state

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens, (advantages, returns, values) = (
            batch.tokens,
            filled(batch, "advantages", "returns", "values"),
        )
        logps = tokens.policy
        old = tokens.get("behavior")
        policy = self.term(
            "policy",
            ppo_loss(logps, old, advantages, dual_clip=self.dual_clip, **self.clip),
            tokens,
        )
        errors = value_loss(tokens.extras["values"], values, returns, clip=self.value_clip)
        value = self.term("value", errors, tokens, weight=self.value_weight)
        metrics = ratio_metrics(tokens, importance(logps, old), *self.clip.values())
        return LossTerms([policy, value], metrics | {"value_error": errors.detach()[tokens.mask]})

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """ref * exp(reward / beta), normalised; none where beta adapts, the discount bites or later
        KL is not credited.
        """
        if (
            self.kl_target is not None
            or self.whiten_rewards
            or self.gamma < 1
            or self.kl_credit == "token"
        ):
            return None
        return (reference + reward / self.beta).log_softmax(-1)
