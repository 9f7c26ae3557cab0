"""f-DPG: a target distribution instead of a reward, matched in any f-divergence."""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from alignkit import divergences
from alignkit.batches import Draw, LossTerms, Plan, RolloutBatch
from alignkit.credit import group_baseline
from alignkit.kl import Direction, importance
from alignkit.objectives.adaptive_proposal import empty_window, looked_at, proposal_gains
from alignkit.objectives.base import Objective, State, tilted
from alignkit.objectives.online.rloo import rloo_loss
from alignkit.objectives.rollout_base import (
    Credit,
    RolloutObjective,
    advantages_of,
    ratio_metrics,
    spread,
    unspread,
)


class FDPG(RolloutObjective):
    """f-divergence policy gradient (Go et al. 2023, arXiv:2302.08215) towards the target
    ref exp(score / beta) / Z. Z is estimated for each completion from the prompt's others. An
    `adaptive` proposal samples; it becomes the policy where that is nearer to the target.

    With the reverse KL the gradient is exactly that of the score minus beta KL, over -beta; with
    the others it is as good as the estimate of Z. Log-ratios to the target are cut at `cap`.
    """

    paper: ClassVar[str] = "Go et al. 2023, arXiv:2302.08215, theorem 1"
    equation: ClassVar[str] = (
        "L = w SG(f'(t) - f'(1)) log pi(y), t = pi Z / (ref exp(score / beta)), w = pi/pi_old"
    )

    beta: PositiveFloat = Field(0.5, description="the target is ref exp(score / beta) / Z")
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon"] = Field(
        "jensen_shannon", description="D_f(policy || target)"
    )
    cap: PositiveFloat = Field(10.0, description="largest log-ratio to the target that counts")
    proposal: Literal["policy", "adaptive"] = Field(
        "policy", description="who samples; adaptive: the policy of the last look that was nearer"
    )
    window: PositiveInt = Field(256, description="adaptive: completions from one look to the next")

    @property
    def plan(self) -> Plan:
        source = "proposal" if self.proposal == "adaptive" else "policy"
        return self.rollout_plan(samples=(Draw(source=source),))

    def init_state(self) -> State:
        """What an adaptive proposal has seen."""
        return empty_window() if self.proposal == "adaptive" else {}

    @property
    def kl_gradient(self) -> tuple[Credit, Direction] | None:
        return ("sequence", "reverse") if self.divergence == "reverse_kl" else None

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        adaptive = cls(divergence="reverse_kl", proposal="adaptive", window=16)
        return [
            cls(),
            cls(divergence="reverse_kl"),
            cls(divergence="forward_kl", cap=2.0),
            adaptive,
        ]

    def credit(self, rollout: RolloutBatch, state: State) -> tuple[RolloutBatch, State]:
        """How much f' at a ratio to the target of 1 is above f' at each completion's ratio."""
        tokens = rollout.tokens
        groups = rollout.groups
        behavior = tokens.sequence("behavior").double()
        score = rollout.scores.double() / self.beta
        unnormalised = tokens.sequence("reference").double() + score

        # The mean of target / behaviour over the others, relative to the group's largest.
        weights = unnormalised - behavior
        _, index = groups.unique(return_inverse=True)
        lowest = weights.new_full((int(index.max()) + 1,), -torch.inf)
        largest = lowest.scatter_reduce(0, index, weights, "amax")[index]
        others = group_baseline((weights - largest).exp(), groups, kind="leave_one_out")
        log_z = torch.where(others > 0, largest + others.log(), weights)

        log_t = (tokens.sequence().double() - unnormalised + log_z).clamp(-self.cap, self.cap)
        # The others' ratios would be a biased baseline: their Z contains this completion.
        slope = divergences.get(self.divergence).f_prime
        gain = slope(torch.zeros_like(log_t)) - slope(log_t)
        credited = replace(rollout, advantages=spread(gain, tokens))
        if self.proposal == "policy":
            return credited, state

        gains = proposal_gains(unnormalised, behavior, tokens.sequence().double(), groups)
        state, renew = looked_at(state, gains, len(groups), self.window)
        return replace(credited, renewed=("proposal",) if renew else ()), state

    def loss(self, batch: RolloutBatch) -> LossTerms:
        tokens = batch.tokens
        policy, old = tokens.sequence(), tokens.sequence("behavior")
        values = rloo_loss(policy, old, unspread(advantages_of(batch), tokens))
        metrics = ratio_metrics(tokens, importance(policy, old))
        return LossTerms([self.term("fdpg", values, tokens)], metrics)

    def optimum(self, reward: Tensor, reference: Tensor) -> Tensor | None:
        """ref * exp(reward / beta), normalised, whatever the divergence."""
        return tilted(reward, reference, self.beta)
