"""SLiC-HF: numbers by hand, RSO's hinge as the case of a flat reference, the optimum of two
responses with noisy labels.
"""

import math

import pytest
import torch

from alignkit.errors import ShapeError
from alignkit.losses import hinge_loss, slic_loss
from alignkit.oracles.optima import minimise

F64 = torch.float64


def test_by_hand():
    chosen, rejected = torch.tensor([-2.0, -3.0], dtype=F64), torch.tensor([-2.5, -9.0], dtype=F64)
    assert slic_loss(chosen, rejected, delta=1.0, sft_weight=0.1).tolist() == pytest.approx(
        [0.5 + 0.2, 0.3], abs=1e-15
    )
    with pytest.raises(ShapeError, match=r"policy_rejected_logps \[1\]"):
        slic_loss(chosen, rejected[:1], delta=1.0)


def test_without_likelihood_it_is_the_hinge_under_a_flat_reference():
    chosen, rejected = -5 * torch.rand(2, 50, dtype=F64)
    flat = torch.full_like(chosen, -3.0)
    wanted = 4.0 * hinge_loss(chosen, rejected, flat, flat, beta=1 / 4.0)
    torch.testing.assert_close(slic_loss(chosen, rejected, delta=4.0), wanted, atol=1e-14, rtol=0)


@pytest.mark.parametrize(("p", "weight"), [(0.55, 0.4), (0.6, 1.5), (0.52, 0.1), (0.9, 8.0)])
def test_two_responses_reach_the_stationary_point(p, weight):
    """The first response is preferred with probability p. Where m = log pi(1)/pi(2) < delta the
    slope is 1 - 2p - weight (p - sigmoid m); it vanishes at sigmoid m = p + (2p - 1) / weight,
    beyond delta at p - (1 - p) / weight; otherwise the kink holds.
    """

    def loss(theta):
        first, second = theta.log_softmax(-1)
        both = [
            slic_loss(a, b, delta=2.0, sft_weight=weight)
            for a, b in ((first, second), (second, first))
        ]
        return p * both[0] + (1 - p) * both[1]

    inside, outside = p + (2 * p - 1) / weight, p - (1 - p) / weight
    edge = 1 / (1 + math.exp(-2.0))
    wanted = inside if inside < edge else max(edge, outside)
    found = minimise(loss, torch.zeros(2, dtype=F64)).softmax(-1)[0].item()
    assert found == pytest.approx(wanted, abs=1e-6)
