"""Curves, verdicts and mean gains of a comparison, from curves made by hand."""

import numpy as np
import pytest

from alignkit.comparison.frontiers import scale_of, verdict_rows
from alignkit.metrics.frontier import Curve, OptimalFrontier, sqrt_scale

BASE = np.linspace(-1, 1, 20)


def curve(name, kls, gain):
    kl = np.broadcast_to(np.array(kls)[:, None, None], (len(kls), 1, 20))
    return Curve(name, tuple(map(str, kls)), kl, BASE + gain * np.sqrt(kl))


def test_mean_gains_are_of_the_range_that_all_runs_span():
    curves = [curve("near", [0.2, 1.0, 2.0], 0.5), curve("far", [1.2, 4.0], 0.6)]
    rows = verdict_rows(curves, BASE, None)
    assert (rows["low"], rows["kl"]) == pytest.approx((1.2, 2.0))
    assert rows["words"] == ""
    gains = {row["label"]: row["area"]["value"] for row in rows["areas"]}
    roots = np.sqrt(np.linspace(1.2, 2.0, 1001)).mean()
    assert gains == pytest.approx({"near": 0.5 * roots, "far": 0.6 * roots}, abs=3e-3)
    (pair,) = rows["pairs"]
    assert pair["kl"] == pytest.approx(2.0)
    assert pair["words"].startswith("far over near at matched KL 2: +0.14")


def test_no_mean_gain_where_the_runs_span_nothing_together():
    """A gain along the line from the base model to a first run far away would be the line's."""
    curves = [curve("near", [0.2, 1.0], 0.5), curve("far", [1.2, 4.0], 0.6)]
    rows = verdict_rows(curves, BASE, None)
    assert (rows["areas"], rows["low"], rows["kl"]) == ([], None, None)
    assert rows["words"].endswith("no run of far below 1.2 nats, none of near above 1")
    (pair,) = rows["pairs"]
    assert pair["words"] == "near and far: not comparable, no run of far below 1.2 nats"
    assert pair["difference"] is None


def test_the_optimum_is_the_scale_where_it_is_known():
    class Listed:
        optimal = OptimalFrontier(np.log([[0.2, 0.3, 0.5]]), [1.0, 0.5, 0.0])

    assert scale_of(None) is sqrt_scale
    at = np.array([0.1, 0.5])
    best = Listed.optimal.score_at(at) - Listed.optimal.base_score
    assert scale_of(Listed())(at) == pytest.approx(best, abs=1e-5)
