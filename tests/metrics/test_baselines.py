"""Best-of-n and the tilted optimum against listing every draw."""

from itertools import combinations, product
from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.errors import ConfigError
from alignkit.metrics.baselines import (
    best_of_n,
    best_of_n_kl,
    exact_best_of_n,
    folklore_kl,
    log_partition_bounds,
    tilted_optimum,
)
from alignkit.metrics.frontier import OptimalFrontier


def listed_law(probs, rewards, n):
    """The law of the best of n draws, of equal ones the first, by listing all m^n of them."""
    law = np.zeros(len(probs))
    for drawn in product(range(len(probs)), repeat=n):
        # max keeps the first
        law[max(drawn, key=lambda i: rewards[i])] += np.prod(probs[list(drawn)])
    return law


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "rewards", [[0.3, -1.0, 2.0, 0.7], [0.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0]]
)
def test_exact_law_is_the_listed_one(rewards, n):
    probs = np.random.default_rng(n).dirichlet(np.ones(4), size=2)
    found = exact_best_of_n(np.log(probs), rewards, n)
    for p, score, kl in zip(probs, found.score, found.kl):
        law = listed_law(p, rewards, n)
        assert score == pytest.approx(law @ rewards, abs=1e-13)
        assert kl == pytest.approx((law * np.log(law / p)).sum(), abs=1e-13)
        assert kl <= folklore_kl(n) + 1e-13


def test_exact_law_of_different_rewards_is_a_power_of_the_distribution_function():
    """pi_n(y) = F(y)^n - F-(y)^n (Beirami et al. 2024)."""
    p, rewards, n = np.array([0.2, 0.5, 0.3]), np.array([1.0, 3.0, 2.0]), 4
    law = np.array([0.2**n, 1 - 0.5**n, 0.5**n - 0.2**n])
    found = exact_best_of_n(np.log(p)[None], rewards, n)
    assert found.score[0] == pytest.approx(law @ rewards, abs=1e-14)
    assert found.kl[0] == pytest.approx((law * np.log(law / p)).sum(), abs=1e-14)


def test_exact_law_stays_exact_for_large_n_and_rare_outcomes():
    probs = np.array([[1e-9, 0.5, 0.5 - 1e-9]])
    found = exact_best_of_n(np.log(probs), [1.0, 0.0, -1.0], 1000)
    top = -np.expm1(1000 * np.log1p(-1e-9))
    assert found.score[0] == pytest.approx(top + 0.0, rel=1e-9)
    assert found.kl[0] == pytest.approx(
        top * log(top / 1e-9) + (1 - top) * log((1 - top) / 0.5), rel=1e-9
    )
    impossible = exact_best_of_n(np.log(np.array([[0.5, 0.5, 1e-320]])), [0.0, 1.0, 2.0], 2)
    assert np.isfinite([*impossible.score, *impossible.kl]).all()


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_estimates_are_the_mean_over_all_subsets(n):
    rng = np.random.default_rng(0)
    scores, logps = rng.normal(size=(3, 6)), -rng.exponential(size=(3, 6))
    found = best_of_n(scores, logps, n)
    for row in range(3):
        best = [max(chosen, key=lambda i: scores[row, i]) for chosen in combinations(range(6), n)]
        assert found.score[row] == pytest.approx(scores[row, best].mean(), abs=1e-12)
        assert found.kl[row] == pytest.approx(best_of_n_kl(logps[row, best], n).mean(), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.floats(-60, 0), st.integers(1, 200))
def test_the_estimator_lies_between_zero_and_the_folklore_bound(logp, n):
    assert -1e-12 <= float(best_of_n_kl(logp, n)) <= folklore_kl(n) + 1e-12


def test_the_estimator_at_its_ends():
    # a certain outcome: best-of-n changes nothing
    assert best_of_n_kl([0.0], 7) == pytest.approx([0.0], abs=1e-15)
    assert best_of_n_kl([-40.0], 7) == pytest.approx([folklore_kl(7)], abs=1e-12)
    assert folklore_kl(1) == 0
    assert folklore_kl(4) == pytest.approx(log(4) - 0.75)


@pytest.mark.parametrize(("e", "n"), [(0.3, 2), (0.05, 8), (0.8, 4)])
def test_the_estimator_is_exact_for_one_outcome_above_a_continuum(e, n):
    """The continuum as 40,000 outcomes below the one of probability e."""
    tiny = np.full(40_000, (1 - e) / 40_000)
    exact = exact_best_of_n(np.log([[e, *tiny]]), [1e6, *range(40_000)], n).kl[0]
    assert best_of_n_kl(log(e), n) == pytest.approx(exact, abs=2e-4)


def test_tilting_samples_is_tilting_their_empirical_law():
    scores = np.random.default_rng(2).normal(size=(3, 50))
    uniform = OptimalFrontier(np.full((3, 50), -log(50)), scores)
    for beta in (0.01, 0.3, 2.0, 1e6):
        found = tilted_optimum(scores, beta)
        kl, score = uniform.at_beta(beta)
        assert (found.kl.mean(), found.score.mean()) == pytest.approx((kl, score), abs=1e-12)
        assert ((found.effective >= 1 - 1e-12) & (found.effective <= 50 + 1e-9)).all()
    assert tilted_optimum(scores, 1e6).effective == pytest.approx([50] * 3, rel=1e-6)
    assert tilted_optimum(scores, 1e-4).kl == pytest.approx([log(50)] * 3, rel=1e-6)


def test_tilting_many_samples_nears_the_exact_optimum():
    """4000 samples of each of three prompts, beta 1: within 4 standard errors of the closed form."""
    rng, probs, rewards = (
        np.random.default_rng(3),
        np.array([0.5, 0.3, 0.2]),
        np.array([0.0, 1.0, 2.0]),
    )
    kl, score = OptimalFrontier(np.log(probs)[None], rewards).at_beta(1.0)
    found = tilted_optimum(rewards[rng.choice(3, p=probs, size=(3, 4000))], 1.0)
    assert found.score.mean() == pytest.approx(score, abs=4 * 0.75 / (3 * 2500) ** 0.5)
    assert found.kl.mean() == pytest.approx(kl, abs=0.05)
    assert (found.effective < 4000).all()


def test_what_cannot_be_asked():
    with pytest.raises(ConfigError, match="at least 5 samples per prompt, there are 4"):
        best_of_n(np.zeros((2, 4)), np.zeros((2, 4)), 5)
    with pytest.raises(ConfigError, match="n is 0"):
        exact_best_of_n([[0.0]], [1.0], 0)
    with pytest.raises(ConfigError, match="must be above 0"):
        tilted_optimum([[1.0]], 0)


def test_log_partition_is_enclosed():
    """On a world of three outcomes: the means of the two ends over many prompts enclose log Z."""
    rng = np.random.default_rng(0)
    probs = np.array([0.5, 0.3, 0.2])
    rewards = np.array([0.0, 1.0, 2.0])
    beta = 0.5
    log_z = float(np.log((probs * np.exp(rewards / beta)).sum()))
    scores = rewards[rng.choice(3, p=probs, size=(8_000, 64))]
    low, high = log_partition_bounds(scores, beta)
    for end, sign in ((low, 1), (high, -1)):
        error = 3 * end.std() / len(end) ** 0.5
        assert sign * (log_z - end.mean()) > -error
        assert abs(log_z - end.mean()) < 0.1
    assert high.mean() > low.mean()

    same = np.full((3, 8), 0.7)  # without spread both are exact
    for end in log_partition_bounds(same, beta):
        np.testing.assert_allclose(end, 0.7 / beta, atol=1e-12)


@pytest.mark.parametrize(("count", "beta"), [(3, 1.0), (8, 0.0)])
def test_log_partition_refuses(count, beta):
    with pytest.raises(ConfigError):
        log_partition_bounds(np.zeros((2, count)), beta)
