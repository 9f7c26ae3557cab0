"""Token-level guidance: rewards of tokens that explain a ranking, and the likelihood weighed by them."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor
from torch.nn.functional import softplus

from alignkit.batches import LossTerms, Plan, RankedBatch, Term
from alignkit.objectives.base import Objective
from alignkit.objectives.reward.reward_model import plackett_luce_loss
from alignkit.tensors import check_same_shape, last_value, masked_sum


def token_rewards(values: Tensor, mask: Tensor) -> Tensor:
    """softplus of the value at the next own token, which is the first that has read this one:
    [N, T] x 2 -> [N, T], above 0.

    The last own token, that of the end, is read by none and gets the mean of the others, 1 where it
    is alone. 0 outside the mask.
    """
    check_same_shape(values=values, mask=mask)
    read = softplus(values)
    following = torch.zeros_like(read)
    after = torch.zeros_like(read[:, 0])
    for t in reversed(range(mask.shape[-1])):
        following[:, t] = after
        after = torch.where(mask[:, t], read[:, t], after)

    number = mask.sum(-1, keepdim=True)
    is_last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    inside = torch.where(mask & ~is_last, following, 0.0)
    mean = inside.sum(-1, keepdim=True) / (number - 1).clamp(min=1)
    return torch.where(is_last, torch.where(number > 1, mean, 1.0), inside)


def guided_sft_loss(policy_logps: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """-sum_t w_t log pi(y_t) with w = rewards / their sum, detached: [N, T] x 3 -> [N].

    Equal rewards give the mean over a completion's tokens. Source: Yang et al. 2023,
    arXiv:2306.00398.
    """
    check_same_shape(policy_logps=policy_logps, rewards=rewards, mask=mask)
    own = torch.where(mask, rewards.detach(), 0.0)
    shares = own / own.sum(-1, keepdim=True).clamp(min=torch.finfo(own.dtype).tiny)
    return -masked_sum(shares * policy_logps, mask)


class TokenGuidance(Objective):
    """Token-level guidance grounded in preferences (Yang et al. 2023, arXiv:2306.00398).

    A value head learns rewards of tokens whose mean over a completion explains the ranking, as a
    reward model does; the best completion's likelihood is weighed by them. The head reads the states
    of the policy itself, and its rewards are of tokens: they are not saved as a reward model.
    """

    paper: ClassVar[str] = "Yang et al. 2023, arXiv:2306.00398"
    equation: ClassVar[str] = (
        "L = sum_k [log sum_{j >= k} exp f(y_j) - f(y_k)] "
        "- sft_weight * sum_t r_t / (sum_s r_s) log pi(y_1,t), f the mean of r"
    )

    scale: NonNegativeFloat = Field(
        1.0, description="multiplies the mean reward before it explains the ranking"
    )
    sft_weight: NonNegativeFloat = Field(
        1.0, description="weight of the best completion's guided likelihood"
    )

    @property
    def plan(self) -> Plan:
        return Plan("ranked", anchors=(), values=True)

    def loss(self, batch: RankedBatch) -> LossTerms:
        tokens = batch.tokens
        rewards = token_rewards(tokens.get("values"), tokens.mask)
        # the last token's reward is the mean of the others
        means, there = batch.ranked(last_value(rewards, tokens.mask))
        ranking = plackett_luce_loss(self.scale * means, there)

        guided, _ = batch.ranked(guided_sft_loss(tokens.policy, rewards, tokens.mask))
        gaps = (means.unsqueeze(-1) - means.unsqueeze(-2)).detach()
        pairs = gaps[(there.unsqueeze(-1) & there.unsqueeze(-2)).triu(1)]
        metrics = {
            "rewards/margins": pairs,
            "rewards/accuracies": (pairs > 0).to(pairs.dtype),
            "rewards/tokens": rewards.detach()[tokens.mask],
        }
        terms = [Term("ranking", ranking), Term("sft", guided[:, 0], weight=self.sft_weight)]
        return LossTerms(terms, metrics)

    @classmethod
    def examples(cls) -> Sequence[Objective]:
        return [cls(), cls(scale=4.0, sft_weight=0.3)]
