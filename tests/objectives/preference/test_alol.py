"""A-LoL: its expected gradient by enumeration, numbers by hand, and that it learns from the
reference's completions.
"""

import math

import pytest
import torch

from alignkit import ALoL
from alignkit.losses import alol_loss
from alignkit.oracles.gradients import Population, gradient

F64 = torch.float64
REWARD = torch.tensor([1.0, -0.5, 0.3, 2.0, 0.0, -1.0, 0.7, 1.5, -0.2], dtype=F64)


def test_by_hand():
    policy = torch.tensor([[math.log(0.5), math.log(0.4), 0.0]] * 3, dtype=F64)
    old = torch.tensor([[math.log(0.25), math.log(0.8), 0.0]] * 3, dtype=F64)
    mask = torch.tensor([[True, True, False]] * 3)
    advantages = torch.tensor([[2.0], [2.0], [-1.0]], dtype=F64).expand(3, 3)
    whole = alol_loss(policy, old, advantages, mask, clip=0.9)  # w = 2 * 1/2 = 1
    torch.testing.assert_close(
        whole[0], torch.tensor([-2 * math.log(0.5), -2 * math.log(0.4), 0.0], dtype=F64)
    )
    each = alol_loss(policy, old, advantages, mask, clip=0.5, ratio="token")  # 2 is clipped to 1.5
    torch.testing.assert_close(
        each[0], torch.tensor([-3 * math.log(0.5), -1 * math.log(0.4), 0.0], dtype=F64)
    )
    assert (whole[2] == 0).all()  # below the mean: nothing to learn


@pytest.mark.parametrize("ratio", ["sequence", "none"])
def test_the_expected_gradient_by_enumeration(ratio):
    """E over pairs of the reference's completions of -clip(pi/ref) max(0, (R_i - R_j) / 2) grad log
    pi_i.
    """
    population = Population.build()
    tree = population.tree
    theta = population.theta + torch.randn(
        population.theta.shape, dtype=F64, generator=torch.Generator().manual_seed(1)
    )
    found = population.delivered(ALoL(ratio=ratio, clip=0.4), REWARD, at=theta)
    ref = tree.sequence_logps(population.theta).exp()
    positive = ((REWARD[:, None] - REWARD[None]) / 2).clamp(min=0) @ ref
    w = (
        (tree.sequence_logps(theta).exp() / ref).clamp(0.6, 1.4)
        if ratio == "sequence"
        else torch.ones_like(ref)
    )
    wanted = gradient(lambda t: -(ref * w * positive * tree.sequence_logps(t)).sum(), theta)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_the_completions_are_the_references():
    (draw,) = ALoL().plan.samples
    assert draw.source == "reference"
    assert ALoL().plan.anchors == ()
