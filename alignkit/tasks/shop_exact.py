"""Exact figures of a policy in the shop: no samples.

A state is what the policy has read: a wish and, after looking, the shelf. In each there are five
outcomes of a turn: the four of the grammar and, last, everything else. The world's choice of a
shelf is the same under every policy, so the KL of whole episodes is the mean, over visits, of the
KL of single turns; and the best law of a turn is ref exp(Q / beta), normalised, where Q is the
reward plus the expected value of the next state.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alignkit.policies.pair import PolicyPair
from alignkit.tasks.exact import kl, outcome_logps, pair_of_folder
from alignkit.tasks.shop import (
    LOOK,
    MOST_TURNS,
    NONSENSE,
    PRICE,
    RIGHT,
    SHELVES,
    TAKES,
    TURNS,
    Shop,
    context,
)

LOOKING = TURNS.index(LOOK)


@dataclass(frozen=True)
class ShopFigures:
    """Means over the wishes, in rewards and nats."""

    reward: float  # E[R]
    kl: float  # KL(policy || reference) of whole episodes, over own tokens
    objective: float  # reward - beta KL
    best: float  # the largest objective that there is
    share: float  # (objective - the reference's) / (best - the reference's)
    looks_first: float  # how often the first turn looks
    outside: float  # how often the first turn is outside the grammar


def shop_laws(pair: PolicyPair, shop: Shop) -> list[Tensor]:
    """Log-probs of the outcomes of a turn after 0, 1, ... looks: [wishes, shelves, 5] float64 each.

    Before the first look all shelves read alike.
    """
    eos = pair.tokenizer.eos_token
    laws = []
    for looks in range(MOST_TURNS):
        shown = SHELVES if looks else SHELVES[:1]
        contexts = [context(prompt, looks, s, eos) for prompt in shop.prompts for s in shown]
        logps = outcome_logps(pair, contexts, TURNS).view(len(shop.prompts), len(shown), -1)
        laws.append(logps.expand(-1, len(SHELVES), -1))
    return laws


def folder_laws(folder: Path | str, shop: Shop) -> list[Tensor]:
    """The same for a model in a folder: the task's base, or a run's `model`."""
    return shop_laws(pair_of_folder(folder), shop)


def shop_figures(policy: list[Tensor], reference: list[Tensor], beta: float) -> ShopFigures:
    """Exact figures of a policy's laws against the reference's."""
    reward = _value(policy, lambda looks: torch.zeros(()))
    cost = _value(policy, lambda looks: kl(policy[looks], reference[looks]), with_rewards=False)
    _, best = shop_optimum(reference, beta)
    start = float(_value(reference, lambda looks: torch.zeros(())).mean())
    objective = float((reward - beta * cost).mean())
    return ShopFigures(
        reward=float(reward.mean()),
        kl=float(cost.mean()),
        objective=objective,
        best=best,
        share=(objective - start) / (best - start),
        looks_first=float(policy[0][..., LOOKING].exp().mean()),
        outside=float(policy[0][..., -1].exp().mean()),
    )


def shop_optimum(reference: list[Tensor], beta: float) -> tuple[list[Tensor], float]:
    """The laws that maximise E[R] - beta KL(policy || reference), and that objective's value."""
    laws: list[Tensor] = []
    following = torch.zeros_like(reference[0][..., 0])
    for looks in reversed(range(MOST_TURNS)):
        tilted = reference[looks] + _gains(following, looks) / beta
        following = beta * tilted.logsumexp(-1)
        laws.insert(0, tilted.log_softmax(-1))
    return laws, float(following.mean())


def _value(
    policy: list[Tensor], per_turn: Callable[[int], Tensor], *, with_rewards: bool = True
) -> Tensor:
    """Expected sum over an episode of the rewards, or of `per_turn` alone: [wishes, shelves]."""
    following = torch.zeros_like(policy[0][..., 0])
    for looks in reversed(range(MOST_TURNS)):
        gains = _gains(following, looks, rewards=with_rewards)
        following = (policy[looks].exp() * gains).sum(-1) + per_turn(looks)
    return following


def _gains(following: Tensor, looks: int, *, rewards: bool = True) -> Tensor:
    """Q of the five outcomes: [wishes, shelves, 5]. `following` [wishes, shelves] are the values
    after one more look. Before the first look the shelf is any of the three.
    """
    right = torch.eye(len(SHELVES), dtype=following.dtype)  # [shelf, taken from]
    if looks == 0:
        right = right.mean(0, keepdim=True).expand_as(right)
        following = following.mean(-1, keepdim=True).expand_as(following)
    if looks + 1 == MOST_TURNS:
        following = torch.zeros_like(following)  # the episode is over

    gains = following.new_zeros((*following.shape, len(TURNS) + 1))
    gains[..., LOOKING] = following
    if rewards:
        gains[..., : len(TAKES)] = RIGHT * right
        gains[..., LOOKING] -= PRICE
        gains[..., -1] = NONSENSE
    return gains
