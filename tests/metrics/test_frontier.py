"""Frontiers: the optimal one against closed forms and every policy, the measured ones against plain
interpolation.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.errors import ShapeError
from alignkit.metrics.frontier import (
    Curve,
    OptimalFrontier,
    area,
    band,
    common_kl,
    efficiency,
    frontier_replicates,
    score_at,
)
from alignkit.metrics.intervals import bootstrap_weights
from alignkit.objectives.preference.dpo import DPO
from alignkit.tasks.exact import figures

RNG = np.random.default_rng(0)
REFERENCE = np.log(RNG.dirichlet(np.full(6, 0.7), size=3))  # 3 prompts, 6 outcomes
REWARDS = np.array([0.0, 1.0, -2.0, 3.0, 0.5, 0.5])
OPTIMAL = OptimalFrontier(REFERENCE, REWARDS)


def exact(policy):
    """Mean KL and score of log-probs [P, n], by alignkit's other room."""
    found = figures(
        *(torch.as_tensor(x, dtype=torch.float64) for x in (policy, REFERENCE, REWARDS))
    )
    return found.kl, found.reward


@pytest.mark.parametrize("beta", [0.05, 0.4, 1.0, 7.0])
def test_the_tilted_family_is_the_objectives_closed_form(beta):
    optimum = DPO(beta=beta).optimum(torch.as_tensor(REWARDS), torch.as_tensor(REFERENCE))
    assert OPTIMAL.at_beta(beta) == pytest.approx(exact(optimum), abs=1e-10)


def test_it_is_found_by_kl_and_its_slope_is_beta():
    kl, score = OPTIMAL.at_beta(np.array([3.0, 1.0, 0.3]))
    assert OPTIMAL.score_at(kl) == pytest.approx(score, abs=1e-9)
    step = 1e-5
    slope = (OPTIMAL.score_at(kl + step) - OPTIMAL.score_at(kl - step)) / (2 * step)
    assert slope == pytest.approx([3.0, 1.0, 0.3], rel=1e-4)


def test_its_ends():
    best = np.exp(REFERENCE[:, 3])
    assert OPTIMAL.max_kl == pytest.approx(-np.log(best).mean(), abs=1e-12)
    assert (OPTIMAL.score_at(0), OPTIMAL.score_at(OPTIMAL.max_kl + 1)) == (OPTIMAL.base_score, 3.0)
    assert OPTIMAL.base_score == pytest.approx(
        float((np.exp(REFERENCE) @ REWARDS).mean()), abs=1e-12
    )
    at, score = OPTIMAL.curve(places=40)
    assert (np.diff(score) > 0).all()
    assert (np.diff(score, 2) < 1e-9).all()  # concave
    assert at[-1] == OPTIMAL.max_kl
    tied = OptimalFrontier(np.log([[0.25, 0.25, 0.5]]), [1.0, 1.0, 0.0])
    assert tied.max_kl == pytest.approx(np.log(2), abs=1e-12)
    assert tied.score_at(tied.max_kl - 1e-6) == pytest.approx(1, abs=1e-3)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 8.0), st.floats(0.05, 20.0))
def test_no_policy_is_above_the_optimal_frontier(seed, noise, beta):
    """Policies at every distance from the tilted family, each prompt with a temperature of its own."""
    rng = np.random.default_rng(seed)
    logits = (
        REFERENCE
        + REWARDS / (beta * rng.uniform(0.5, 2, size=(3, 1)))
        + noise * rng.normal(size=REFERENCE.shape)
    )
    policy = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    kl, score = exact(policy)
    assert score <= OPTIMAL.score_at(kl) + 1e-9
    if kl > 0.1:
        assert efficiency(kl, score, OPTIMAL) <= 1 + 1e-8


def test_mixing_two_models_lies_on_or_left_of_the_straight_line():
    """What interpolation claims: the mixture of two policies has their mean score at no more than
    their mean KL.
    """
    first, second = (
        DPO(beta=b).optimum(torch.as_tensor(REWARDS), torch.as_tensor(REFERENCE)).exp()
        for b in (0.3, 2.0)
    )
    for share in (0.1, 0.5, 0.9):
        kl, score = exact((share * first + (1 - share) * second).log())
        kls, scores = zip(exact(first.log()), exact(second.log()))
        assert score == pytest.approx(share * scores[0] + (1 - share) * scores[1], abs=1e-12)
        assert kl <= share * kls[0] + (1 - share) * kls[1] + 1e-12


def test_efficiency_by_hand():
    kl, best = OPTIMAL.at_beta(0.8)
    half = OPTIMAL.base_score + (best - OPTIMAL.base_score) / 2
    found = efficiency([kl, kl, 0.1, 0.0], [best, half, 0.3, 0.3], OPTIMAL)
    assert found[:2] == pytest.approx([1, 0.5], abs=1e-9)
    assert np.isnan(found[2:]).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_frontiers_are_interpolated_from_the_reference_on(seed, points):
    rng = np.random.default_rng(seed)
    kl, score, base = (
        rng.uniform(0, 4, size=(7, points)),
        rng.normal(size=(7, points)),
        rng.normal(size=7),
    )
    missing = rng.random((7, points)) < 0.2
    at = np.array([0.0, 0.3, 1.7, 4.0, 9.0])
    found = score_at(np.where(missing, np.nan, kl), np.where(missing, np.nan, score), base, at)
    for row in range(7):
        x, y = (
            np.append(first, values[row][~missing[row]])
            for first, values in ((0, kl), (base[row], score))
        )
        order = np.argsort(x)
        assert found[row] == pytest.approx(np.interp(at, x[order], y[order]), abs=1e-12)


def curve(seed=0, seeds=2, prompts=30, gain=0.5, name="a"):
    rng = np.random.default_rng(seed)
    kl = np.array([1.0, 2.0, 4.0])[:, None, None] + 0.1 * rng.normal(size=(3, seeds, prompts))
    return Curve(name, ("3", "2", "1"), kl, gain * np.sqrt(kl) + 0.1 * rng.normal(size=kl.shape))


def test_bands_follow_the_bootstrap():
    measured, base = curve(), np.random.default_rng(5).normal(0, 0.1, 30)
    found = band(measured, base, at=[0.0, 1.5, 3.0], draws=400)
    weights = bootstrap_weights(30, 2, draws=400)
    replicates = []
    for prompts, seeds in zip(weights.prompts, weights.seeds):
        kl, score = (
            np.einsum("bsp,s,p->b", x, seeds, prompts) for x in (measured.kl, measured.score)
        )
        replicates.append(np.interp(found.at, [0, *kl], [prompts @ base, *score]))
    assert found.low == pytest.approx(np.quantile(replicates, 0.025, axis=0), abs=1e-12)
    assert found.high == pytest.approx(np.quantile(replicates, 0.975, axis=0), abs=1e-12)
    assert ((found.low < found.score) & (found.score < found.high)).all()
    assert band(measured, base, draws=50).at[[0, -1]] == pytest.approx([0, measured.kl[-1].mean()])


def test_a_failed_run_leaves_its_curve_standing():
    whole = curve()
    kl, score = whole.kl.copy(), whole.score.copy()
    kl[1, 0], score[1, 0] = np.nan, np.nan  # one seed of the middle setting
    kl[2], score[2] = np.nan, np.nan  # the last setting altogether
    found = Curve("b", whole.settings, kl, score)
    means = found.means()
    assert means[0][:2] == pytest.approx([whole.kl[0].mean(), whole.kl[1, 1].mean()])
    assert np.isnan(means[0][2])
    assert common_kl([whole, found]) == pytest.approx(means[0][1])
    assert np.isfinite(frontier_replicates(found, np.zeros(30), [0.5, 3.0], draws=300)).all()


def test_area_by_hand():
    """Score 1 + x up to x = 2: mean gain 1; flat beyond, so up to 4: (1 + 2) / 2."""
    straight = Curve("a", ("1",), np.full((1, 1, 5), 2.0), np.full((1, 1, 5), 3.0))
    assert area(straight, np.ones(5), 2.0).value == pytest.approx(1.0, abs=1e-12)
    assert area(straight, np.ones(5), 4.0).value == pytest.approx(1.5, abs=1e-12)
    found = area(curve(), np.zeros(30), 4.0)
    assert found.low < found.value < found.high


def test_curves_are_checked():
    with pytest.raises(ShapeError, match=r"2 settings, kl \[1, 1, 3\], score \[1, 1, 3\]"):
        Curve("a", ("1", "2"), np.zeros((1, 1, 3)), np.zeros((1, 1, 3)))
