"""Score against KL from the runs of a comparison, as plain JSON: curves with bands, baselines that
need no training, and verdicts at matched KL.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from alignkit.comparison.grid import Point
from alignkit.comparison.measurement import Measurement
from alignkit.evaluation.exact import Listed
from alignkit.metrics.baselines import Baseline, best_of_n, folklore_kl, tilted_optimum
from alignkit.metrics.comparisons import compare_frontiers, compare_matched
from alignkit.metrics.frontier import (
    Curve,
    Scale,
    band,
    efficiency,
    mean_gain,
    spanned_range,
    sqrt_scale,
)
from alignkit.metrics.intervals import Array, Interval, mean_interval

DRAWS = 2000  # bootstrap replicates of an interval
PLACES = 61  # places on the KL axis at which a band is drawn
TILTS = (4.0, 2.0, 1.0, 0.5, 0.25, 0.125)  # beta of the tilted optimum, in deviations of the score
Row = dict[str, Any]  # one JSON object


def interval_row(interval: Interval) -> Row:
    """An interval as a JSON object."""
    return asdict(interval)


def setting_of(point: Point) -> str:
    """The swept fields of a point in words, such as "beta=0.1, alpha=2"."""
    return ", ".join(f"{field}={value}" for field, value in point.swept.items())


def curves_of(
    points: Sequence[Point], measurements: Mapping[str, Measurement | None], *, exact: bool
) -> list[Curve]:
    """One curve for each label that has at least one measured run.

    A run without a measurement is nan; a setting without any measured run is left out.
    """
    curves = []
    for label in dict.fromkeys(point.label for point in points):
        own = [point for point in points if point.label == label]
        settings = list(dict.fromkeys(setting_of(point) for point in own))
        seeds = list(dict.fromkeys(point.seed for point in own))
        means = {
            point.name: _means_per_prompt(measurement, exact)
            for point in own
            if (measurement := measurements[point.name]) is not None
        }
        if not means:
            continue

        prompts = next(iter(means.values())).shape[1]
        kl = np.full((len(settings), len(seeds), prompts), np.nan)
        score = np.full_like(kl, np.nan)
        for point in own:
            if point.name in means:
                place = (settings.index(setting_of(point)), seeds.index(point.seed))
                kl[place], score[place] = means[point.name]

        measured = ~np.isnan(kl).all((1, 2))
        names = tuple(name for name, known in zip(settings, measured) if known)
        curves.append(Curve(label, names, kl[measured], score[measured]))
    return curves


def _means_per_prompt(measurement: Measurement, exact: bool) -> Array:
    """KL and score of a run as means per prompt: [2, P]."""
    if exact:
        assert measurement.exact is not None
        return np.array([measurement.exact["kl"], measurement.exact["score"]])
    means = measurement.measured.per_prompt()
    return np.array([means["kl"], means["score"]])


def scale_of(listed: Listed | None) -> Scale:
    """How frontiers are interpolated between runs: by the efficiency where the optimum is known,
    else by the gain in sqrt(KL).
    """
    return sqrt_scale if listed is None else listed.optimal.scale()


def curve_row(curve: Curve, base_score: Array, listed: Listed | None) -> Row:
    """A curve's points in the order of their KL, and its band from KL 0 on."""
    kl, _ = curve.means()
    at = np.linspace(0, float(np.nanmax(kl)), PLACES)
    shape = band(curve, base_score, draws=DRAWS, at=at, scale=scale_of(listed))
    return {
        "label": curve.name,
        "points": [_point_row(curve, setting, listed) for setting in np.argsort(kl)],
        "band": {name: getattr(shape, name) for name in ("at", "score", "low", "high")},
    }


def _point_row(curve: Curve, setting: int, listed: Listed | None) -> Row:
    kl = mean_interval(curve.kl[setting], draws=DRAWS)
    score = mean_interval(curve.score[setting], draws=DRAWS)
    row: Row = {
        "setting": curve.settings[setting],
        "kl": interval_row(kl),
        "score": interval_row(score),
    }
    if listed is not None:
        row["efficiency"] = float(efficiency(kl.value, score.value, listed.optimal))
    return row


def verdict_rows(
    curves: Sequence[Curve],
    base_score: Array,
    listed: Listed | None,
    decoders: Sequence[Curve] = (),
) -> Row:
    """Pairs of objectives and decoders at matched KL, and mean gains from `low` to `kl` nats, the
    range that the runs of all objectives span. Where there is no such range, `words` say why and no
    mean gain is given.
    """
    if not curves:
        return {"pairs": [], "areas": [], "low": None, "kl": None, "words": ""}
    scale = scale_of(listed)
    every = [*curves, *decoders]
    comparisons = compare_frontiers(every, base_score, scale=scale) if len(every) > 1 else []
    pairs = [{**asdict(pair), "words": pair.verdict} for pair in comparisons]

    low, high = spanned_range(curves)
    if low > high:
        first = max(curves, key=lambda curve: curve.span[0])
        last = min(curves, key=lambda curve: curve.span[1])
        words = (
            "mean gains are not comparable, no KL is spanned by the runs of all objectives: "
            f"no run of {first.name} below {low:.2g} nats, none of {last.name} above {high:.2g}"
        )
        return {"pairs": pairs, "areas": [], "low": None, "kl": None, "words": words}

    gains = {
        curve.name: mean_gain(curve, base_score, low, high, scale=scale, draws=DRAWS)
        for curve in curves
    }
    areas = [{"label": label, "area": interval_row(gain)} for label, gain in gains.items()]
    return {"pairs": pairs, "areas": areas, "low": low, "kl": high, "words": ""}


def matched_rows(
    targets: Sequence[Row],
    price: Sequence[Row],
    curves: Sequence[Curve],
    base_score: Array,
    listed: Listed | None,
) -> Row:
    """How the search of `compare.match_kl` ended, what it cost, and the verdicts at its KLs, between
    the runs that reached them.
    """
    by_label = {curve.name: curve for curve in curves}
    runs: dict[float, list[Curve]] = {}
    for target in targets:
        if target["setting"] is not None:
            curve = by_label[target["label"]]
            place = [curve.settings.index(target["setting"])]
            own = Curve(curve.name, (target["setting"],), curve.kl[place], curve.score[place])
            runs.setdefault(target["target"], []).append(own)

    compared = compare_matched(runs, base_score, scale=scale_of(listed))
    pairs = [{**asdict(pair), "words": pair.verdict} for pair in compared]
    return {"targets": targets, "pairs": pairs, "price": price}


def baseline_rows(counts: Sequence[int], base: Measurement, listed: Listed | None) -> Row:
    """What needs no training: best-of-n for each n of `counts`, the tilted optimum, and where all
    outcomes can be listed the optimal frontier.
    """
    if listed is not None:
        return _exact_baselines(counts, listed)

    rows: Row = {"best_of_n": [], "tilted": [], "optimal": None}
    if base.pool is not None:
        scores = base.pool["score"]
        logps = base.pool["logp"]
    else:
        assert base.measured.score is not None
        assert base.measured.logp is not None
        scores = base.measured.score
        logps = base.measured.logp
    samples = scores.shape[1]
    rows["samples"] = samples
    if np.isnan(scores).any():
        rows["words"] = "no baselines: some of the base's samples have no score"
        return rows

    rows["best_of_n"] = [
        _best_of_n_row(best_of_n(scores, logps, n), n) for n in counts if n <= samples
    ]
    deviation = float(scores.std()) or 1.0
    for tilt in TILTS:
        beta = tilt * deviation
        rows["tilted"].append({"beta": beta, **_baseline_row(tilted_optimum(scores, beta))})
    return rows


def _exact_baselines(counts: Sequence[int], listed: Listed) -> Row:
    # Places are close together at small KL, where the optimum rises like a square root.
    at = listed.optimal.max_kl * np.linspace(0, 1, PLACES) ** 2
    return {
        "best_of_n": [_best_of_n_row(listed.best_of_n(n), n) for n in counts],
        "tilted": [],
        "optimal": {"kl": at, "score": listed.optimal.score_at(at)},
    }


def _best_of_n_row(baseline: Baseline, n: int) -> Row:
    return {"n": n, "folklore": folklore_kl(n), **_baseline_row(baseline)}


def _baseline_row(baseline: Baseline) -> Row:
    row: Row = {
        "kl": interval_row(mean_interval(baseline.kl, draws=DRAWS)),
        "score": interval_row(mean_interval(baseline.score, draws=DRAWS)),
    }
    if baseline.effective is not None:
        row["effective"] = float(baseline.effective.mean())
    return row
