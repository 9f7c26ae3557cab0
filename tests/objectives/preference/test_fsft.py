"""f-divergence SFT: for every f the optimum is the demonstrator, and the value there is minus the
divergence from it.
"""

import pytest
import torch

from alignkit import divergences
from alignkit.errors import ConfigError
from alignkit.losses import fsft_loss
from alignkit.oracles.gradients import gradient
from alignkit.oracles.optima import minimise

F64 = torch.float64
NAMES = (
    "jensen_shannon",
    "reverse_kl",
    "forward_kl",
    "alpha",
    "hellinger",
    "jeffreys",
    "neyman_chi2",
    "chi2_kl",
)


def population(name, theta, expert, reference):
    """Mean loss over demonstrations from `expert` and samples of the reference, drawn apart: [n] x
    3 -> scalar.
    """
    logps, n = theta.log_softmax(-1), len(theta)
    i, j = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
    losses = fsft_loss(logps[i], logps[j], reference[i], reference[j], divergence=name)
    return (expert.exp()[i] * reference.exp()[j] * losses).sum()


@pytest.fixture
def world():
    return torch.randn(2, 6, dtype=F64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)


@pytest.mark.parametrize("name", NAMES)
def test_the_optimum_is_the_demonstrator(name, world):
    expert, reference = world
    found = minimise(
        lambda theta: population(name, theta, expert, reference), reference
    ).log_softmax(-1)
    torch.testing.assert_close(found, expert, atol=1e-6, rtol=0)
    least = -(
        reference.exp() * divergences.get(name).f(expert - reference)
    ).sum()  # the variational bound is met
    torch.testing.assert_close(
        population(name, expert, expert, reference), least, atol=1e-12, rtol=0
    )


def test_reverse_kl_is_maximum_likelihood_in_the_mean(world):
    expert, reference = world
    theta = torch.randn(6, dtype=F64, generator=torch.Generator().manual_seed(1))
    found = gradient(lambda t: population("reverse_kl", t, expert, reference), theta)
    wanted = gradient(lambda t: -(expert.exp() * t.log_softmax(-1)).sum(), theta)
    torch.testing.assert_close(found, wanted, atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_rare_and_frequent_samples_keep_a_finite_slope_of_the_right_sign(name):
    # log u of the sample; the chosen is neutral
    policy = torch.tensor([-1e4, -40.0, -5.0, 5.0, 40.0, 1e4], requires_grad=True)
    zero = torch.zeros(6)
    (slope,) = torch.autograd.grad(
        fsft_loss(zero, policy, zero, zero, divergence=name).sum(), policy
    )
    assert slope.isfinite().all()
    assert (slope >= 0).all()
    assert (slope[2:] > 0).all()


def test_an_unknown_divergence_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'jeffreys'"):
        fsft_loss(*torch.zeros(4, 1), divergence="jefreys")
