"""DRPO: its expected gradient is the exact one of win rate minus KL if the judge is right, or if
the data are the reference's.
"""

import pytest
import torch
from torch import Tensor

from alignkit import DRPO
from alignkit.batches import PairBatch, TokenLogps
from alignkit.losses import drpo_loss
from alignkit.oracles.games import random_games

F64 = torch.float64
N = 4


def log_policy(seed: int) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=F64).log_softmax(-1)


def expected_gradient(
    objective: DRPO, at: Tensor, anchor: Tensor, data: Tensor, truth: Tensor, judge: Tensor
) -> Tensor:
    """Gradient in the logits over all pairs of `data` labelled by `truth`, and all samples;
    one-token responses.
    """
    logits = at.clone().requires_grad_()
    chosen, rejected, own = torch.cartesian_prod(*[torch.arange(N)] * 3).T
    drawn = (chosen, rejected, own)
    # either order was drawn
    weights = 2 * (data[chosen] + data[rejected] + at[own]).exp() * truth[chosen, rejected]

    def tokens(index: Tensor) -> TokenLogps:
        held = {"reference": anchor[index, None]}
        return TokenLogps(
            logits.log_softmax(-1)[index, None], held, torch.ones(len(index), 1, dtype=torch.bool)
        )

    table = torch.stack([torch.stack([judge[i, j] for j in drawn], -1) for i in drawn], -2)
    terms = objective.loss(PairBatch(*map(tokens, drawn), table)).terms
    total = sum(term.weight * (weights * term.values).sum() for term in terms)
    return torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("right", ["judge", "reference", "neither"])
def test_it_is_right_where_the_judge_or_the_reference_is(right):
    games, beta = random_games(2, N, 1.0, seed=3).preference, 0.3
    truth, wrong = games
    at, data = log_policy(0), log_policy(1)
    anchor = log_policy(2) if right != "reference" else data
    objective = DRPO(beta=beta, samples=1, clip=1e4)
    found = expected_gradient(
        objective, at, anchor, data, truth, truth if right == "judge" else wrong
    )
    leaf = at.clone().requires_grad_()
    policy = leaf.log_softmax(-1)
    value = policy.exp() @ truth @ data.exp() - beta * (policy.exp() * (policy - anchor)).sum()
    error = (found + torch.autograd.grad(value, leaf)[0]).abs().max()
    assert error > 1e-2 if right == "neither" else error < 1e-14


def test_ratios_are_clipped_on_both_sides():
    policy = torch.tensor([0.0, 3.0, -3.0], dtype=F64, requires_grad=True)
    losses = drpo_loss(
        policy,
        torch.zeros(3, dtype=F64),
        torch.ones(3, dtype=F64),
        torch.full((3,), 0.2, dtype=F64),
        clip=2.0,
    )
    slopes = torch.autograd.grad(losses.sum(), policy)[0]
    torch.testing.assert_close(slopes, -0.8 * torch.tensor([1.0, 2.0, 0.5], dtype=F64))
