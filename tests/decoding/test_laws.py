"""Laws of decoders on listed spaces, against enumeration of all pools of samples."""

import math
from itertools import product

import pytest
import torch

from alignkit.decoding import best_of_n, quasi_rejection, soft_best_of_n
from alignkit.errors import ConfigError, ShapeError

REFERENCE = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARDS = torch.tensor([0.3, -1.0, 2.0, 0.3], dtype=torch.float64)  # two outcomes are equal
EXACT = {"rtol": 0, "atol": 1e-11}


def enumerated(n, choose):
    """The law of `choose(rewards of the pool) -> probabilities over the pool`, over all pools."""
    law = torch.zeros(4, dtype=torch.float64)
    for pool in product(range(4), repeat=n):
        probability = math.prod(float(REFERENCE[i]) for i in pool)
        for i, share in zip(pool, choose(REWARDS[list(pool)])):
            law[i] += probability * float(share)
    return law


@pytest.mark.parametrize("n", [1, 2, 5])
def test_best_of_n_is_the_enumerated_law(n):
    def best(rewards):
        top = (rewards == rewards.max()).double()
        return top / top.sum()

    torch.testing.assert_close(best_of_n(REFERENCE, REWARDS, n), enumerated(n, best), **EXACT)


@pytest.mark.parametrize("beta", [0.01, 0.5, 3.0, 1e4])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_soft_best_of_n_is_the_enumerated_law(n, beta):
    law = enumerated(n, lambda rewards: (rewards / beta).softmax(0))
    torch.testing.assert_close(soft_best_of_n(REFERENCE, REWARDS, n, beta), law, **EXACT)


def test_soft_best_of_n_has_its_limits():
    many = soft_best_of_n(REFERENCE, REWARDS, 100_000, 0.7)
    tilted = (REFERENCE.log() + REWARDS / 0.7).softmax(0)
    torch.testing.assert_close(many, tilted, rtol=0, atol=1e-4)

    hard = soft_best_of_n(REFERENCE, REWARDS, 6, 1e-6)
    torch.testing.assert_close(hard, best_of_n(REFERENCE, REWARDS, 6), **EXACT)


def test_soft_best_of_n_keeps_close_to_the_reference():
    """q <= n p, so the KL to the reference is at most log n (Verdun et al.)."""
    for n in (2, 8, 32):
        law = soft_best_of_n(REFERENCE, REWARDS, n, 0.05)
        assert bool((law <= n * REFERENCE + 1e-12).all())
        assert float((law * (law / REFERENCE).log()).sum()) <= math.log(n)


@pytest.mark.parametrize("bound", [0.2, 1.5, 100.0])
def test_quasi_rejection_accepts_the_clipped_tilt(bound):
    beta = 0.8
    law, acceptance = quasi_rejection(REFERENCE, REWARDS, beta, bound)
    weights = (REWARDS / beta).exp().clamp(max=bound)
    torch.testing.assert_close(law, REFERENCE * weights / (REFERENCE * weights).sum(), **EXACT)
    assert acceptance == pytest.approx(float((REFERENCE * weights).sum()) / bound, abs=1e-12)

    kl = float((law * (law / REFERENCE).log()).sum())
    accepted = (REWARDS / beta).clamp(max=math.log(bound))
    by_acceptance = float((law * accepted).sum()) - math.log(bound * acceptance)
    assert kl == pytest.approx(by_acceptance, abs=1e-12)


def test_outcomes_of_probability_zero_stay_impossible():
    reference = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    rewards = torch.tensor([0.0, 1.0, 9.0], dtype=torch.float64)
    for law in (
        best_of_n(reference, rewards, 3),
        soft_best_of_n(reference, rewards, 3, 0.5),
        quasi_rejection(reference, rewards, 0.5, 2.0)[0],
    ):
        assert float(law[2]) == 0
        assert float(law.sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: best_of_n(REFERENCE, REWARDS, 0), ConfigError),
        (lambda: best_of_n(REFERENCE, REWARDS[:2], 2), ShapeError),
        (lambda: best_of_n(2 * REFERENCE, REWARDS, 2), ConfigError),
        (lambda: best_of_n(REFERENCE, REWARDS.log(), 2), ConfigError),
        (lambda: soft_best_of_n(REFERENCE, REWARDS, 2, 0.0), ConfigError),
        (lambda: quasi_rejection(REFERENCE, REWARDS, 1.0, -1.0), ConfigError),
    ],
)
def test_arguments_out_of_range_are_refused(call, error):
    with pytest.raises(error):
        call()
