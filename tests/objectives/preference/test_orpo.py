"""ORPO: numbers by hand, odds that stay exact and finite, the optimum of two responses between its
two limits.
"""

import math

import pytest
import torch

from alignkit.losses import orpo_loss
from alignkit.objectives.preference.orpo import log_odds
from alignkit.oracles.optima import minimise

F64 = torch.float64


def test_by_hand():
    chosen, rejected = torch.tensor([0.5]).log().double(), torch.tensor([0.2]).log().double()
    wanted = math.log(2) + 0.3 * math.log1p(math.exp(-math.log(1.0 / 0.25)))  # odds 1 and 1/4
    assert orpo_loss(chosen, rejected, odds_weight=0.3).item() == pytest.approx(wanted, abs=1e-7)


def test_odds_from_rare_to_certain():
    p = torch.tensor([1e-12, 0.3, 0.5, 0.7, 1 - 1e-5], dtype=F64)
    torch.testing.assert_close(log_odds(p.log()), (p / (1 - p)).log(), atol=1e-10, rtol=1e-10)
    a = torch.tensor([-1e4, -1e-3, -1e-9, 0.0], requires_grad=True)
    value = log_odds(a)
    (slope,) = torch.autograd.grad(value.sum(), a)
    assert value.isfinite().all()
    assert (value.diff() > 0).all()
    assert slope.tolist() == pytest.approx([1.0, 1000.5, 1e6, 1e6], rel=1e-3)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1e4])
def test_two_responses_lie_between_likelihood_and_odds_ratio(weight):
    """One token, the first preferred with probability p. Likelihood alone ends at sigmoid(m) = p,
    the odds ratio alone at sigmoid(2m) = p; the sum where (p - sigmoid m) + 2 weight (p - sigmoid
    2m) = 0.
    """
    p = 0.8

    def loss(theta):
        first, second = theta.log_softmax(-1)
        one, two = (
            orpo_loss(a, b, odds_weight=weight) for a, b in ((first, second), (second, first))
        )
        return p * one + (1 - p) * two

    theta = minimise(loss, torch.zeros(2, dtype=F64))
    m = theta[0] - theta[1]
    assert abs((p - m.sigmoid()) + 2 * weight * (p - (2 * m).sigmoid())) < 1e-6 * (1 + 2 * weight)
    half = math.log(p / (1 - p)) / 2
    assert half - 1e-4 < m < 2 * half + 1e-6
    if weight in (0.0, 1e4):
        assert m.item() == pytest.approx(half if weight else 2 * half, abs=1e-4)
