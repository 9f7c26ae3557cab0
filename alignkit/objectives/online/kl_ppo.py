"""KL-penalised proximal policy optimisation: the RLHF classic."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from alignkit.batches import LossTerms, Plan, RolloutBatch
from alignkit.credit import adapt_beta, reward_to_go, shaped_rewards
from alignkit.kl import Direction, importance
from alignkit.objectives.base import Objective, State
from alignkit.objectives.entropic import entropic_optimum
from alignkit.objectives.rollout_base import Credit, DualClip, ValueObjective, advantages_of
from alignkit.objectives.surrogates import ppo_loss
from alignkit.objectives.surrogates import value_loss as value_loss  # exported by the registry
from alignkit.tensors import masked_sum


class KLPPO(ValueObjective):
    """PPO on rewards with the KL inside (Ziegler et al. 2019,
    arXiv:1909.08593; Ouyang et al. 2022, arXiv:2203.02155).
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
    dual_clip: DualClip | None = Field(
        None, description="largest ratio that counts where the advantage is negative"
    )

    @property
    def plan(self) -> Plan:
        return self.rollout_plan(values=True)

    @property
    def kl_gradient(self) -> tuple[Credit, Direction] | None:
        unbiased = self.gamma == self.lam == 1 and not self.whiten_rewards
        return (self.kl_credit, "reverse") if unbiased else None

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        wide = {"clip_low": 0.6, "clip_high": 1.0, "dual_clip": 3.0, "value_clip": 0.5}
        estimate = {"whiten_rewards": True, "gamma": 0.9, "lam": 0.9}
        other = {"kl_credit": "token", "kl_target": 0.6, "aggregation": "sequence_mean"}
        risky = {"aggregation": "constant", "length": 4, "risk": 0.7}
        return [cls(), cls(**risky), cls(**wide, **estimate, **other)]

    def init_state(self) -> State:
        return {"beta": torch.tensor(self.beta, dtype=torch.float64)}

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """Rewards with the KL inside, GAE, whitening; with `kl_target` the next coefficient."""
        tokens = rollout.tokens
        kl = tokens.log_ratio.double()
        beta = state["beta"].to(kl)

        # Inside the rewards a token pays for the KL that it causes later; outside for its own alone.
        # A risk is that of the scores, so that the KL stays outside of its values.
        inside = self.kl_credit == "sequence" and not self.risk
        rewards = shaped_rewards(
            rollout.scores,
            kl,
            tokens.mask,
            beta=beta if inside else 0.0,
            rewards=rollout.rewards,
        )
        cost = torch.zeros_like(kl)
        if not inside:
            cost = beta * (kl if self.kl_credit == "token" else reward_to_go(kl, tokens.mask))
        credited = self.credited(rollout, rewards, cost)

        if self.kl_target is not None:
            mean = masked_sum(kl, tokens.mask).mean()
            beta = adapt_beta(
                beta, mean, target=self.kl_target, horizon=self.kl_horizon, samples=len(kl)
            )
            state = {"beta": beta}

        return credited, state

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        logps = tokens.policy
        old = tokens.get("behavior")
        advantages = advantages_of(batch)
        losses = ppo_loss(logps, old, advantages, dual_clip=self.dual_clip, **self.clip)
        metrics = self.metrics(tokens, importance(logps, old), advantages)
        policy = LossTerms([self.term("policy", losses, tokens)], metrics)
        return policy + self.value_terms(batch)

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """ref * exp(reward / beta), normalised; none where beta adapts, the discount bites or later
        KL is not credited. With a risk below 0 that of the entropic utility, above 0 none.
        """
        adapts = self.kl_target is not None
        if adapts or self.whiten_rewards or self.gamma < 1 or self.kl_credit == "token":
            return None
        return entropic_optimum(reward, reference, beta=self.beta, risk=self.risk)
