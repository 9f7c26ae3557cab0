"""Bootstrap, intervals and corrections against scipy, enumeration and hand-worked cases."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from alignkit.errors import ConfigError
from alignkit.metrics.intervals import (
    Interval,
    bootstrap_weights,
    holm,
    holm_levels,
    interval,
    jackknife_weights,
    mean_interval,
    p_value,
    sampling_interval,
    standard_error,
    weighted_means,
    wilson,
)

SKEWED = np.random.default_rng(0).exponential(size=25)


@pytest.mark.parametrize("method", ["percentile", "BCa"])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_intervals_are_scipys_for_the_same_replicates(method, level):
    replicates = weighted_means(SKEWED[None], bootstrap_weights(25, draws=3000))
    theirs = stats.bootstrap((SKEWED,), np.mean, n_resamples=2, method="percentile")
    theirs.bootstrap_distribution = replicates
    low, high = stats.bootstrap(
        (SKEWED,),
        np.mean,
        n_resamples=0,
        bootstrap_result=theirs,
        method=method,
        confidence_level=level,
    ).confidence_interval
    jackknife = weighted_means(SKEWED[None], jackknife_weights(25)) if method == "BCa" else None
    found = interval(float(SKEWED.mean()), replicates, level=level, jackknife=jackknife)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)
    whole = mean_interval(
        SKEWED, level=level, method="bca" if jackknife is not None else "percentile", draws=3000
    )
    assert (whole.value, whole.low, whole.high) == (found.value, found.low, found.high)


def test_replicates_have_the_law_of_all_resamples():
    """Four prompts and two seeds: 4^4 x 2^2 resamples, each as likely."""
    values = np.array([[0.0, 1.0, 3.0, 7.0], [2.0, 2.0, 5.0, 4.0]])
    every = [
        values[np.ix_(s, p)].mean()
        for p in product(range(4), repeat=4)
        for s in product(range(2), repeat=2)
    ]
    draws = 40_000
    found = weighted_means(values, bootstrap_weights(4, 2, draws=draws))
    assert found.mean() == pytest.approx(values.mean(), abs=5 * np.std(every) / draws**0.5)
    assert found.var() == pytest.approx(np.var(every), rel=0.03)
    assert stats.ks_2samp(found, every).statistic < 0.05


def test_prompts_are_paired_and_seeds_are_not():
    first, second = (bootstrap_weights(6, 3, draws=50, stream=stream) for stream in (0, 1))
    assert (first.prompts == second.prompts).all()
    assert (first.seeds != second.seeds).any()
    assert (bootstrap_weights(6, 3, draws=50, seed=1).prompts != first.prompts).any()
    for weights in (
        first.prompts,
        first.seeds,
        jackknife_weights(6, 3).prompts,
        jackknife_weights(6, 3).seeds,
    ):
        assert weights.sum(-1) == pytest.approx(1, abs=1e-12)


def test_means_leave_missing_runs_out():
    # 2 settings, 2 seeds, 3 prompts
    values = np.array([[[1.0, 2.0, 4.0], [np.nan] * 3], [[np.nan] * 3, [3.0, 5.0, 9.0]]])
    weights = bootstrap_weights(3, 2, draws=200)
    found = weighted_means(values, weights)
    for prompts, seeds, means in zip(weights.prompts, weights.seeds, found):
        for setting, seed in ((0, 0), (1, 1)):
            wanted = prompts @ values[setting, seed] if seeds[seed] else np.nan
            assert means[setting] == pytest.approx(wanted, abs=1e-12, nan_ok=True)


def test_one_prompt_says_nothing_about_others():
    found = mean_interval([0.3])
    assert found.value == 0.3
    assert np.isnan([found.low, found.high]).all()
    assert not found.excludes_zero
    assert p_value(np.full(10, np.nan)) == 1


@pytest.mark.parametrize(("seeds", "prompts", "draws"), [(0, 3, 9), (1, 0, 9), (1, 3, 0)])
def test_impossible_bootstraps_are_refused(seeds, prompts, draws):
    with pytest.raises(ConfigError, match="at least 1 of each"):
        bootstrap_weights(prompts, seeds, draws=draws)


def test_standard_error_counts_the_spread_within_prompts_alone():
    values = np.array([[1.0, 3.0], [10.0, 10.0]])  # variances of the prompts' means: 1 and 0
    assert standard_error(values) == pytest.approx(0.5, abs=1e-15)
    found = sampling_interval(values)
    assert found.value == 6
    assert (found.low, found.high) == pytest.approx(
        (6 - 0.5 * 1.9599639845, 6 + 0.5 * 1.9599639845), abs=1e-9
    )
    assert np.isnan(standard_error(np.ones((3, 1))))
    unknown = np.array([[1.0, np.nan, 3.0], [10.0, 10.0, np.nan], [np.nan, np.nan, 4.0]])
    assert standard_error(unknown) == pytest.approx(0.5, abs=1e-15)


@pytest.mark.parametrize(("wins", "n"), [(0, 7), (3, 7), (30, 41), (41, 41)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_wilson_is_scipys_for_one_verdict_per_prompt(wins, n, level):
    low, high = stats.binomtest(wins, n).proportion_ci(level, method="wilson")
    found = wilson([1.0] * wins + [0.0] * (n - wins), level=level)
    assert (found.value, found.low, found.high) == pytest.approx((wins / n, low, high), abs=1e-12)


def test_wilson_of_steadier_prompts_is_narrower():
    coarse, fine = wilson([0.0, 1.0, 0.0, 1.0]), wilson([0.4, 0.6, 0.4, 0.6])
    assert coarse.value == fine.value == 0.5
    assert fine.high - fine.low < 0.3 * (coarse.high - coarse.low)


def test_p_value_by_hand():
    assert p_value([-1.0, 1.0, 2.0, 3.0]) == 0.5
    assert p_value([1.0, 2.0, 3.0, 4.0]) == 0.5  # never below 2 / R
    assert p_value(np.zeros(8)) == 1


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02], abs=1e-15)
    assert holm_levels([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
        [1 - 0.05 / 3, 0.975, 0.975, 1 - 0.05 / 4], abs=1e-15
    )
    assert holm([]) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=8), st.floats(0.5, 0.99))
def test_corrected_intervals_exclude_zero_where_holm_rejects(p_values, level):
    """A p-value is the largest alpha at which an interval of level 1 - alpha excludes 0."""
    for p, adjusted, own in zip(p_values, holm(p_values), holm_levels(p_values, level)):
        if abs(adjusted - (1 - level)) > 1e-9:
            assert (adjusted < 1 - level) == (p < 1 - own)
        assert level - 1e-12 <= own < 1


def test_a_family_without_differences_is_rarely_rejected():
    """Ten comparisons of nothing, 400 times: Holm at 5 % errs in about 5 % of the families, plain
    tests in about 40 %.
    """
    noise = np.random.default_rng(1).normal(size=(400, 10, 40))
    weights = bootstrap_weights(40, draws=2000)
    wrong = {"holm": 0, "plain": 0}
    for family in noise:
        p_values = [p_value(r) for r in weighted_means(family[:, None], weights).T]
        wrong["holm"] += min(holm(p_values)) < 0.05
        wrong["plain"] += min(p_values) < 0.05
    # 0.05, the bootstrap's optimism with 40 prompts, and noise of 400 families
    assert wrong["holm"] / 400 < 0.10
    assert wrong["plain"] / 400 > 0.3


def test_excludes_zero():
    assert Interval(1, 0.5, 2).excludes_zero
    assert Interval(-1, -2, -0.5).excludes_zero
    assert not Interval(1, -0.5, 2).excludes_zero
