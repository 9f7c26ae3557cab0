"""What GRPO and its relatives may add to their loss: an entropy bonus, and a mask on completions that
the policy has left behind.
"""

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from alignkit.batches import Plan, RolloutBatch, Term, TokenLogps
from alignkit.objectives.rollout_base import GroupObjective, advantages_of
from alignkit.tensors import check_same_shape, masked_mean

BONUS = "entropy_bonus"  # the statistic
ENTROPY_TERM = "entropy"


def policy_entropy(
    policy_logprobs: Tensor, anchor_logprobs: Tensor | None, labels: Tensor
) -> Tensor:
    """The plan's statistic: the policy's entropy in nats at each token, with gradient (the head's
    own "entropy" has none): [C, V], unused, [C] -> [C].
    """
    # Impossible tokens have log-prob -inf; clamped, they count 0 log 0 = 0.
    lowest = torch.finfo(policy_logprobs.dtype).min
    return -(policy_logprobs.exp() * policy_logprobs.clamp(min=lowest)).sum(-1)


def on_policy_enough(
    policy_logps: Tensor,
    behavior_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    threshold: float,
) -> Tensor:
    """Which tokens may teach, [N, T] x 4 -> bool [N, T]: those whose advantage is not negative, and
    all of completions that the policy is still about as likely to write as when it sampled them:
    the mean of log behaviour - log policy over their tokens is at most `threshold` nats.

    DeepSeek-V3.2, arXiv:2512.02556, "off-policy sequence masking".
    """
    check_same_shape(policy_logps=policy_logps, advantages=advantages, mask=mask)
    drift = masked_mean((behavior_logps - policy_logps).detach(), mask)
    return (advantages >= 0) | (drift <= threshold).unsqueeze(-1)


class ExploringGroup(GroupObjective):
    """A group objective with an entropy bonus and an off-policy mask, both off by default."""

    entropy_weight: NonNegativeFloat = Field(
        0.0, description="weight of the mean entropy of a token, which is maximised; 0 = off"
    )
    off_policy_threshold: PositiveFloat | None = Field(
        None,
        description="completions with a negative advantage whose tokens lost more than this many "
        "nats each since they were sampled teach nothing; null = off",
    )

    def exploring_plan(self, anchors: tuple[str, ...] = ()) -> Plan:
        """A rollout's plan under these anchors, with the entropy where it has a weight."""
        if not self.entropy_weight:
            return self.rollout_plan(anchors=anchors)
        return self.rollout_plan(
            anchors=anchors, statistics={BONUS: policy_entropy}, without_anchor=(BONUS,)
        )

    def teaching_advantages(self, batch: RolloutBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The advantages [N, T], 0 where the off-policy mask falls, and what to log of it."""
        advantages = advantages_of(batch)
        if self.off_policy_threshold is None:
            return advantages, {}
        tokens = batch.tokens
        teaches = on_policy_enough(
            tokens.policy,
            tokens.get("behavior"),
            advantages,
            tokens.mask,
            threshold=self.off_policy_threshold,
        )
        masked = (~teaches[tokens.mask]).to(tokens.policy.dtype)
        return advantages.where(teaches, 0.0), {"off_policy_masked": masked}

    def entropy_terms(self, tokens: TokenLogps) -> list[Term]:
        """Minus the mean entropy of a token, at its weight; none at weight 0."""
        if not self.entropy_weight:
            return []
        return [Term(ENTROPY_TERM, -tokens.extras[BONUS], "tokens", self.entropy_weight)]
