"""Frontiers: the optimal one against closed forms and every policy, the measured ones against plain
interpolation.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.errors import ShapeError
from alignkit.metrics.frontier import (
    Curve,
    OptimalFrontier,
    band,
    efficiency,
    frontier_replicates,
    mean_gain,
    score_at,
    spanned_range,
    sqrt_scale,
    why_outside,
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


def test_a_straight_line_in_the_optimal_scale_has_one_efficiency():
    """From the reference to one run, and as far as another of the same efficiency."""
    scale = OPTIMAL.scale()
    kl, best = OPTIMAL.at_beta(np.array([2.0, 0.4]))
    score = OPTIMAL.base_score + 0.8 * (best - OPTIMAL.base_score)
    at = np.linspace(0.11, kl[1], 30)
    found = efficiency(at, score_at(kl, score, OPTIMAL.base_score, at, scale), OPTIMAL)
    assert found == pytest.approx(np.full(30, 0.8), abs=1e-4)


def test_the_optimal_scale_is_the_optimal_gain_and_never_turns_back():
    scale = OPTIMAL.scale()
    at = np.linspace(0, 1.5 * OPTIMAL.max_kl, 500)
    assert scale(at) == pytest.approx(OPTIMAL.score_at(at) - OPTIMAL.base_score, abs=5e-4)
    assert (np.diff(scale(at)) > 0).all()
    assert np.isnan(scale(np.array([np.nan])))[0]


RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


@pytest.mark.parametrize("name", ["compare", "compare_stories"])
def test_held_out_runs_lie_on_the_scale_not_on_the_chord(name):
    """The middle run of every published curve, from the two beside it: the straight line in KL is
    several times as far off as the scale that verdicts use, and sqrt(KL) lies between them.
    """
    results = json.loads((RESULTS / f"{name}.json").read_text())
    base = results["base"]["score"]["value"]
    scales = {"chord": lambda kl: kl, "sqrt": sqrt_scale}
    optimal = results["baselines"]["optimal"]
    if optimal:
        roots, gains = np.sqrt(optimal["kl"]), np.array(optimal["score"]) - base
        scales["efficiency"] = lambda kl: np.interp(np.sqrt(kl), roots, gains)
    errors = {}
    for rule, scale in scales.items():
        misses = []
        for row in results["curves"]:
            kl, score = (
                np.array([point[field]["value"] for point in row["points"]])
                for field in ("kl", "score")
            )
            (middle,) = score_at(kl[[0, 2]], score[[0, 2]], base, kl[1], scale)
            misses.append(abs(middle - score[1]))
        errors[rule] = np.mean(misses)
    assert errors["sqrt"] < 0.6 * errors["chord"]
    if optimal:
        assert errors["efficiency"] < 0.2 * errors["sqrt"]


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
        expected = np.interp(np.sqrt(at), np.sqrt(x[order]), y[order])
        assert found[row] == pytest.approx(expected, abs=1e-12)


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
        roots = np.sqrt([0, *kl])
        replicates.append(np.interp(np.sqrt(found.at), roots, [prompts @ base, *score]))
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
    assert spanned_range([whole, found]) == pytest.approx((means[0][0], means[0][1]), rel=0.05)
    assert np.isfinite(frontier_replicates(found, np.zeros(30), [0.5, 3.0], draws=300)).all()


def test_mean_gain_by_hand():
    """Score 1 + 2 sqrt(KL) up to KL 4. Gain from 1 to 4: 2 (8 - 1) (2 / 3) / 3; at 4 alone: 4."""
    kl = np.broadcast_to(np.array([1.0, 4.0])[:, None, None], (2, 1, 5))
    straight = Curve("a", ("2", "1"), kl, 1 + 2 * np.sqrt(kl))
    assert mean_gain(straight, np.ones(5), 1.0, 4.0).value == pytest.approx(28 / 9, abs=1e-4)
    assert mean_gain(straight, np.ones(5), 4.0, 4.0).value == pytest.approx(4.0, abs=1e-12)
    found = mean_gain(curve(), np.zeros(30), 1.0, 4.0)
    assert found.low < found.value < found.high


def test_gains_are_paired_with_the_base():
    """Prompts that differ by much, alike before and after: the gain is known exactly."""
    base = np.random.default_rng(1).normal(0, 10, 40)
    kl = np.broadcast_to(np.array([1.0, 4.0])[:, None, None], (2, 1, 40))
    found = mean_gain(Curve("a", ("2", "1"), kl, base + np.sqrt(kl)), base, 1.0, 4.0)
    assert found.high - found.low < 1e-9


def test_what_the_runs_span():
    low, high = curve(), Curve("far", ("1",), np.full((1, 2, 30), 6.0), np.zeros((1, 2, 30)))
    assert spanned_range([low]) == low.span == pytest.approx((1.0, 4.0), abs=0.1)
    first, last = spanned_range([low, high])
    assert (first, last) == pytest.approx((6.0, low.span[1]))
    assert why_outside([low, high], last) == "no run of far below 6 nats"
    assert why_outside([low], 0.3) == "no run of a below 1 nats"
    assert why_outside([low], 7.0) == "no run of a above 4 nats"
    assert why_outside([low], 2.0) == ""


def test_curves_are_checked():
    with pytest.raises(ShapeError, match=r"2 settings, kl \[1, 1, 3\], score \[1, 1, 3\]"):
        Curve("a", ("1", "2"), np.zeros((1, 1, 3)), np.zeros((1, 1, 3)))
