"""Verdicts at matched KL: their words, their pairing, their error rate."""

import numpy as np
import pytest

from alignkit.metrics.comparisons import compare_frontiers, compare_matched, verdict
from alignkit.metrics.frontier import Curve
from alignkit.metrics.intervals import Interval


def test_words_come_from_the_interval():
    where = "at matched KL 3"
    assert (
        verdict("a", "b", Interval(0.031, 0.012, 0.049), where)
        == "a over b at matched KL 3: +0.031 [0.012, 0.049]"
    )
    assert (
        verdict("a", "b", Interval(-0.031, -0.049, -0.012), where)
        == "b over a at matched KL 3: +0.031 [0.012, 0.049]"
    )
    none = "a and b at matched KL 3: no difference shown (-0.004 [-0.018, 0.010])"
    assert verdict("a", "b", Interval(-0.004, -0.018, 0.010), where) == none
    assert (
        verdict("a", "b", Interval(0.5, float("nan"), float("nan")))
        == "a and b: no difference shown (+0.500 [nan, nan])"
    )


def curves(rng, gains, prompts=40, spread=1.0, noise=0.02):
    """Curves whose prompts differ by `spread`, alike for all curves, and by `noise`, each for
    itself.
    """
    difficulty = spread * rng.normal(size=prompts)
    kl = np.broadcast_to(np.array([1.0, 3.0])[:, None, None], (2, 1, prompts))
    scores = [gain * np.sqrt(kl) + difficulty + noise * rng.normal(size=kl.shape) for gain in gains]
    return [Curve(f"m{i}", ("1", "2"), kl, score) for i, score in enumerate(scores)], difficulty


def test_pairing_sees_what_the_prompts_hide():
    """Prompts differ fifty times as much as the objectives do."""
    measured, base = curves(np.random.default_rng(0), [0.5, 0.53])
    (found,) = compare_frontiers(measured, base)
    assert found.kl == pytest.approx(3.0)
    assert found.verdict.startswith("m1 over m0 at matched KL 3: +0.0")
    assert found.difference.value == pytest.approx(-0.03 * 3**0.5, abs=0.015)
    unpaired, _ = curves(np.random.default_rng(1), [0.53])
    (blurred,) = compare_frontiers([measured[0], unpaired[0]], base)
    assert "no difference shown" in blurred.verdict


def test_the_same_model_twice_differs_by_nothing():
    measured, base = curves(np.random.default_rng(0), [0.5])
    (found,) = compare_frontiers([measured[0], measured[0]], base, draws=500)
    assert (found.difference.value, found.difference.low, found.difference.high, found.p) == (
        0,
        0,
        0,
        1,
    )
    assert "no difference shown" in found.verdict


def test_curves_of_different_reach_are_compared_where_both_are():
    measured, base = curves(np.random.default_rng(0), [0.5, 0.6])
    short = Curve("short", ("1",), measured[1].kl[:1], measured[1].score[:1])
    found = {
        (c.first, c.second): c.kl for c in compare_frontiers([*measured, short], base, draws=200)
    }
    assert found == pytest.approx({("m0", "m1"): 3.0, ("m0", "short"): 1.0, ("m1", "short"): 1.0})
    assert [c.kl for c in compare_frontiers(measured, base, at=2.0, draws=200)] == [2.0]


def test_no_verdict_where_one_of_the_two_has_no_run():
    """A curve that begins above another's end: the chord from the base model must not decide."""
    measured, base = curves(np.random.default_rng(0), [0.5, 0.6])
    near = Curve("near", ("1", "2"), measured[0].kl / 4, measured[0].score)  # 0.25 to 0.75
    pairs = {(c.first, c.second): c for c in compare_frontiers([near, *measured], base, draws=300)}
    apart = pairs["near", "m0"]
    assert apart.verdict == "near and m0: not comparable, no run of m0 below 1 nats"
    assert (apart.kl, apart.difference, apart.p, apart.adjusted_p) == (None,) * 4

    # The others are compared as if it were not there: it is no member of the family.
    (alone,) = compare_frontiers(measured, base, draws=300)
    both = pairs["m0", "m1"]
    assert both.kl == alone.kl
    assert both.difference.level == alone.difference.level == 0.95

    (fixed,) = compare_frontiers(measured, base, at=5.0, draws=300)
    assert fixed.reason == "no run of m0 above 3 nats, no run of m1 above 3 nats"


def test_between_runs_the_gain_follows_sqrt_kl():
    """Both curves are the same line in sqrt(KL), one with a run where the other has none: there is
    no difference, where a chord in KL would show one of 0.024.
    """
    (dense,), base = curves(np.random.default_rng(0), [0.5], noise=0.0)
    kl = np.full((1, 1, 40), 2.0)
    middle = Curve("middle", ("1",), kl, 0.5 * np.sqrt(kl) + base)
    (found,) = compare_frontiers([dense, middle], base, draws=300)
    assert found.kl == pytest.approx(2.0)
    assert found.difference.value == pytest.approx(0.0, abs=1e-12)


def test_levels_are_those_of_the_whole_family():
    """Three curves that differ by nothing, 200 times: about 5 % of the families show any
    difference.
    """
    rng, wrong = np.random.default_rng(2), 0
    for _ in range(200):
        measured, base = curves(rng, [0.5] * 3, prompts=60, noise=0.5)
        found = compare_frontiers(measured, base, draws=600)
        wrong += any(c.difference.excludes_zero for c in found)
        for c in found:
            assert c.difference.level >= 0.95
            assert c.adjusted_p >= c.p
    assert wrong / 200 < 0.09


def test_matched_runs_are_compared_by_their_own_share_of_the_scale():
    """Runs on gain = 0.6 sqrt(KL) and 0.5 sqrt(KL), none of them exactly at the target."""
    base = np.linspace(-1, 1, 20)

    def run(name, kl, slope):
        kls = np.full((1, 1, 20), kl)
        return Curve(name, (f"kl={kl}",), kls, base + slope * np.sqrt(kls))

    runs = {
        1.0: [run("a", 0.93, 0.6), run("b", 1.08, 0.5), run("c", 1.0, 0.5)],
        4.0: [run("a", 4.3, 0.6), run("b", 3.7, 0.5)],
    }
    pairs = {(one.first, one.second, one.kl): one for one in compare_matched(runs, base)}
    assert list(pairs) == [("a", "b", 1.0), ("a", "c", 1.0), ("b", "c", 1.0), ("a", "b", 4.0)]
    assert pairs["a", "b", 1.0].difference.value == pytest.approx(0.1)
    assert pairs["b", "c", 1.0].difference.value == pytest.approx(0.0, abs=1e-12)
    assert pairs["a", "b", 4.0].difference.value == pytest.approx(0.2)
    assert pairs["a", "b", 4.0].verdict.startswith("a over b at matched KL 4: +0.200")
