"""Figures of completions and verdicts against enumeration, scipy and hand-worked cases."""

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from alignkit.errors import ConfigError
from alignkit.evaluation.measurements import Measured, wins
from alignkit.judges import Verdict
from alignkit.metrics.completions import (
    calibration,
    distinct_n,
    length_controlled_win_rate,
    majority_at_k,
    pass_at_k,
    preference_calibration,
    score_wins,
    win_rate,
)


def vote(answers, right):
    """Share of right ones among the most frequent answers; None abstains."""
    counts = Counter(answer for answer in answers if answer is not None)
    most = max(counts.values(), default=0)
    best = [answer for answer, count in counts.items() if count == most]
    return sum(answer in right for answer in best) / len(best) if best else 0.0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=7),
    st.sets(st.sampled_from(["a", "b", "c"])),
    st.data(),
)
def test_majority_is_the_mean_over_all_subsets(answers, right, data):
    k = data.draw(st.integers(1, len(answers)))
    subsets = [
        vote([answers[i] for i in chosen], right) for chosen in combinations(range(len(answers)), k)
    ]
    found = majority_at_k(answers, [answer in right for answer in answers], k)
    assert found == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_majority_of_one_is_pass_at_one():
    answers, marks = ["x", "y", "y", "z"], [True, False, False, False]
    assert majority_at_k(answers, marks, 1) == pass_at_k([1], 4, 1) == 0.25
    with pytest.raises(ConfigError, match="1 <= k <= answers"):
        majority_at_k(answers, marks, 5)


def test_distinct_n_by_hand():
    rows = [["a", "b", "a", "b"], ["a"]]  # ab ba ab
    assert distinct_n(rows, 1) == pytest.approx(2 / 5)
    assert distinct_n(rows, 2) == pytest.approx(2 / 3)
    assert math.isnan(distinct_n(rows, 5))


def test_win_rate_counts_what_is_invalid():
    found = win_rate(
        [[1.0, 0.5], [0.0, 0.5], [0.5, 0.5]], [[True, True], [True, False], [False, False]]
    )
    assert found.invalid == pytest.approx(0.5)
    # the mean of the two prompts that have a verdict
    assert found.rate.value == pytest.approx((0.75 + 0.0) / 2)
    nothing = win_rate([0.5, 0.5], [False, False])
    assert (nothing.invalid, math.isnan(nothing.rate.value), nothing.rate.excludes_zero) == (
        1.0,
        True,
        False,
    )
    always = win_rate(np.ones(20))
    assert (always.rate.value, always.rate.high) == (1, 1)
    assert 0.8 < always.rate.low < 0.9  # 20 / (20 + z^2)


def logistic_data(seed=0, n=4000, a=0.4, b=1.5):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(1, 60, size=(2, n))
    gap = first - second
    chance = 1 / (1 + np.exp(-(a + b * np.tanh(gap / gap.std()))))
    return (rng.random(n) < chance).astype(float), first, second, gap


def test_length_controlled_win_rate_is_the_fit_of_an_optimiser():
    wins, first, second, gap = logistic_data()
    x = np.tanh(gap / gap.std())

    def loss(weights):
        z = weights[0] + weights[1] * x
        return np.logaddexp(0, z).mean() - (wins * z).mean() + 0.5e-3 * weights[1] ** 2

    a = minimize(loss, [0.0, 0.0], tol=1e-12).x[0]
    found = length_controlled_win_rate(wins, first, second)
    assert found == pytest.approx(1 / (1 + math.exp(-a)), abs=1e-5)
    assert found == pytest.approx(1 / (1 + math.exp(-0.4)), abs=0.03)  # what made the data


def test_length_control_removes_what_length_explains():
    """A side that wins by being long, and only so, is a coin toss; equal lengths leave the plain
    win rate.
    """
    rng = np.random.default_rng(1)
    first = rng.integers(20, 60, 3000)
    second = first - rng.integers(-30, 50, 3000)
    chance = 1 / (1 + np.exp(-3 * np.tanh((first - second) / (first - second).std())))
    wins = (rng.random(3000) < chance).astype(float)
    assert wins.mean() > 0.58
    assert length_controlled_win_rate(wins, first, second) == pytest.approx(0.5, abs=0.04)
    assert length_controlled_win_rate([1, 0, 1, 1], [5] * 4, [5] * 4) == pytest.approx(
        0.75, abs=1e-6
    )
    assert length_controlled_win_rate([1, 1], [9, 3], [1, 2]) > 0.999  # separable: no overflow


def test_calibration_by_hand():
    """Bins of width 0.1 above 0.5: [0.52, 0.58] right 1 of 2; [0.95, 1.0] right 2 of 2; confidence
    1 is in the last bin.
    """
    found = calibration([0.52, 0.58, 0.95, 1.0], [1, 0, 1, 1], bins=5)
    assert found.accuracy == 0.75
    assert found.confidences == pytest.approx([0.55, 0.975], abs=1e-12)
    assert found.accuracies.tolist() == [0.5, 1.0]
    assert found.counts.tolist() == [2, 2]
    assert found.error == pytest.approx(0.5 * 0.05 + 0.5 * 0.025, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40), st.integers(1, 12)
)
def test_calibration_error_is_the_textbook_sum(answers, bins):
    """Guo et al. 2017, eq. 3, one bin at a time."""
    wanted = 0.0
    for b in range(bins):
        inside = [(p, y) for p, y in answers if min(int(p * bins), bins - 1) == b]
        if inside:
            wanted += abs(sum(y for _, y in inside) - sum(p for p, _ in inside)) / len(answers)
    found = calibration([p for p, _ in answers], [y for _, y in answers], bins=bins, low=0.0)
    assert found.error == pytest.approx(wanted, abs=1e-12)


def test_calibration_of_preferences():
    margins = np.log([3.0, 3.0, 3.0, 1 / 3])  # confidence 3/4, right three times of four
    found = preference_calibration(margins)
    assert (found.accuracy, found.error) == pytest.approx((0.75, 0.0), abs=1e-12)
    assert preference_calibration([0.0, 0.0]).accuracy == 0.5
    with pytest.raises(ConfigError, match="at least one"):
        preference_calibration([])
    # no overflow
    assert preference_calibration([-800.0, 800.0]).error == pytest.approx(0.5, abs=1e-12)


def test_a_score_that_judges():
    probability, valid = score_wins([[2.0, 1.0], [0.0, math.nan]], [[1.0, 1.0], [3.0, 1.0]])
    assert probability.tolist() == [[1.0, 0.5], [0.0, 0.5]]
    assert valid.tolist() == [[True, True], [True, False]]


def test_wins_of_one_model_over_another():
    def model(texts, scores):
        nothing = np.zeros((2, 2))
        return Measured(
            "m",
            ["a", "b"],
            texts,
            [[[1], [1]]] * 2,
            nothing,
            scores,
            nothing,
            nothing,
            nothing,
            nothing,
        )

    def judge(prompts, first, second):
        """Prefers the longer text; knows nothing of prompt b's first answer."""
        assert prompts == ["a", "a", "b", "b"]
        longer = [float(len(x) > len(y)) for x, y in zip(first, second)]
        return Verdict(
            torch.tensor(longer, dtype=torch.float64), torch.tensor([True, True, False, True])
        )

    one, other = (
        model([["xx", "y"], ["z", "zz"]], [[1, 2], [3, 4]]),
        model([["x", "yy"], ["z", "z"]], [[0, 2], [4, 4]]),
    )
    probability, valid = wins(one, other, judge)
    assert (probability.tolist(), valid.tolist()) == (
        [[1, 0], [0, 1]],
        [[True, True], [False, True]],
    )
    assert wins(one, other)[0].tolist() == [[1, 0.5], [0, 0.5]]
    assert wins(one, model([["x", "yy"], ["z", "z"]], None)) is None
