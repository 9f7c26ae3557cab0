"""From what was measured to the figures of the report: curves, frontiers, baselines, verdicts.
Everything is plain JSON.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from alignkit.comparison.grid import Point, section_of
from alignkit.comparison.run_state import outcome_of
from alignkit.config.recipe import Recipe, shipped_recipes
from alignkit.evaluation.measurements import Measured
from alignkit.metrics.baselines import Baseline, best_of_n, folklore_kl, tilted_optimum
from alignkit.metrics.comparisons import compare_frontiers
from alignkit.metrics.completions import (
    length_controlled_win_rate,
    majority_at_k,
    pass_at_k,
    preference_calibration,
    win_rate,
)
from alignkit.metrics.frontier import Curve, area, band, common_kl, efficiency
from alignkit.metrics.intervals import Interval, mean_interval
from alignkit.training.run_folder import read_lines

DRAWS = 2000
PLACES = 61
SHOWN_PROMPTS = 8
# beta of the tilted optimum, in standard deviations of the score
TILTS = (
    4.0,
    2.0,
    1.0,
    0.5,
    0.25,
    0.125,
)
Found = dict[str, Any]


def gather(recipe: Recipe, points: Sequence[Point], appraiser: Any, *, seconds: float) -> Found:
    """The content of results.json."""
    out = Path(recipe.output_dir)
    section = section_of(recipe)
    kept = json.loads((out / "base.json").read_text())
    base = Measured.load(kept["measured"])
    measured = {point.name: _measured_of(point, appraiser.key) for point in points}
    listed = appraiser.listed
    start = listed.base if listed else base.per_prompt()["score"]
    curves = _curves(points, measured, exact=listed is not None)
    results: Found = {
        "recipe": _name(recipe),
        "model": recipe.model.name_or_path,
        "data": recipe.data.train,
        "exact": listed is not None,
        "prompts": len(base.prompts),
        "samples": section.samples,
        "seeds": list(section.seeds),
        "seconds": seconds,
        "base": _summary(base) | ({"score": _plain(mean_interval(start))} if listed else {}),
        "runs": [
            _run(point, measured[point.name], base, section.correct, listed) for point in points
        ],
        "curves": [_curve(curve, start, listed) for curve in curves],
        "baselines": _baselines(section.best_of, kept.get("pool"), listed, base),
        "verdicts": _verdicts(curves, start),
        "samples_shown": _samples(points, measured, base),
        "pass_at_k": _pass_rows(points, measured, base, section.correct),
        "training": {point.name: _training(point) for point in points},
    }
    results = _finite(results)
    (out / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    return results


def _name(recipe: Recipe) -> str:
    """How the recipe is named on a command line: by its bare name where it ships with the package."""
    file = Path(recipe.origin.name)
    return next((name for name, shipped in shipped_recipes().items() if shipped == file), str(file))


def _measured_of(point: Point, key: str) -> Found | None:
    file = Path(point.recipe.output_dir) / "measured.json"
    if outcome_of(point).status != "finished" or not file.exists():
        return None
    found = json.loads(file.read_text())
    return {**found, "measured": Measured.load(found["measured"])} if found["key"] == key else None


def _run(
    point: Point, found: Found | None, base: Measured, correct: float | None, listed: Any
) -> Found:
    """One row of the table of runs."""
    outcome = outcome_of(point)
    row: Found = {
        "name": point.name,
        "label": point.label,
        "swept": dict(point.swept),
        "seed": point.seed,
        "status": outcome.status,
        "reason": outcome.reason,
        "seconds": outcome.seconds,
        "cpu_seconds": outcome.cpu_seconds,
        "objective": point.recipe.objective,
    }
    if found is None:
        return row
    measured: Measured = found["measured"]
    row |= {
        "figures": _summary(measured),
        "standard_errors": measured.standard_errors(),
        "wins": _wins(found, measured, base),
    }
    if "exact" in found:
        exact = {name: float(np.mean(values)) for name, values in found["exact"].items()}
        row["exact"] = exact | {
            "efficiency": float(efficiency(exact["kl"], exact["score"], listed.optimal))
        }
    if "margins" in found:
        fit = preference_calibration(found["margins"])
        row["calibration"] = {name: _listed(value) for name, value in asdict(fit).items()}
    return row


def _summary(measured: Measured) -> Found:
    return {name: _plain(found) for name, found in measured.summary(draws=DRAWS).items()}


def _wins(found: Found, measured: Measured, base: Measured) -> Found:
    """The win rate against the base, or why there is none. Equal texts are ties that no judge was
    asked about.
    """
    probability = np.array(found["wins"])
    valid = np.array(found["valid"], dtype=bool)
    asked = np.array([[a != b for a, b in zip(*row)] for row in zip(measured.texts, base.texts)])
    row: Found = {
        "rate": dict.fromkeys(("value", "low", "high")),
        "invalid": 1.0,
        "length_controlled": None,
        "words": "",
    }
    if asked.any() and not valid[asked].any():
        words = f"no win rate: all {asked.sum()} verdicts of the judge are invalid; look at its answers and its endpoint"
        return row | {"words": words}
    rate = win_rate(probability, valid)
    lengths = (measured.lengths[valid], base.lengths[valid])
    controlled = length_controlled_win_rate(probability[valid], *lengths)
    return row | {
        "rate": _plain(rate.rate),
        "invalid": rate.invalid,
        "length_controlled": controlled,
    }


def _curves(
    points: Sequence[Point], measured: dict[str, Found | None], *, exact: bool
) -> list[Curve]:
    """One per label with at least one finished run; failed runs are nan."""
    curves = []
    for label in dict.fromkeys(point.label for point in points):
        mine = [point for point in points if point.label == label]
        settings = list(dict.fromkeys(setting_of(point) for point in mine))
        seeds = list(dict.fromkeys(point.seed for point in mine))
        figures = {point.name: _per_prompt(measured[point.name], exact) for point in mine}
        known = [value for value in figures.values() if value is not None]
        if not known:
            continue
        kl, score = (
            np.full((len(settings), len(seeds), known[0].shape[1]), np.nan) for _ in range(2)
        )
        for point in mine:
            value = figures[point.name]
            if value is not None:
                place = settings.index(setting_of(point)), seeds.index(point.seed)
                kl[place], score[place] = value
        kept = ~np.isnan(kl).all((1, 2))
        curves.append(
            Curve(label, tuple(s for s, keep in zip(settings, kept) if keep), kl[kept], score[kept])
        )
    return curves


def setting_of(point: Point) -> str:
    """The swept fields of a point in words."""
    return ", ".join(f"{field}={value}" for field, value in point.swept.items())


def _per_prompt(found: Found | None, exact: bool) -> np.ndarray | None:
    """KL and score per prompt: [2, P]."""
    if found is None:
        return None
    source = found["exact"] if exact else found["measured"].per_prompt()
    return np.array([source["kl"], source["score"]])


def _curve(curve: Curve, start: np.ndarray, listed: Any) -> Found:
    kl = curve.means()[0]
    shape = band(curve, start, draws=DRAWS, at=np.linspace(0, float(np.nanmax(kl)), PLACES))
    order = np.argsort(kl)
    return {
        "label": curve.name,
        "points": [_point(curve, i, listed) for i in order],
        "band": {name: _listed(getattr(shape, name)) for name in ("at", "score", "low", "high")},
    }


def _point(curve: Curve, i: int, listed: Any) -> Found:
    kl, score = (mean_interval(values[i], draws=DRAWS) for values in (curve.kl, curve.score))
    found = {"setting": curve.settings[i], "kl": _plain(kl), "score": _plain(score)}
    return found | (
        {"efficiency": float(efficiency(kl.value, score.value, listed.optimal))} if listed else {}
    )


def _verdicts(curves: Sequence[Curve], start: np.ndarray) -> Found:
    """Areas and pairwise comparisons at matched KL."""
    if not curves:
        return {"pairs": [], "areas": [], "kl": None}
    reach = common_kl(curves)
    areas = [
        {"label": curve.name, "area": _plain(area(curve, start, reach, draws=DRAWS))}
        for curve in curves
    ]
    compared = compare_frontiers(curves, start) if len(curves) > 1 else []
    pairs = [
        {**asdict(found), "difference": _plain(found.difference), "words": found.verdict}
        for found in compared
    ]
    return {"kl": reach, "areas": areas, "pairs": pairs}


def _baselines(counts: Sequence[int], pool: Found | None, listed: Any, base: Measured) -> Found:
    """Best-of-n, the tilted optimum and, where it can be listed, the optimal frontier."""
    found: Found = {"best_of_n": [], "tilted": [], "optimal": None}
    if listed is not None:
        at = listed.optimal.max_kl * np.linspace(0, 1, PLACES) ** 2  # it rises like a square root
        found["optimal"] = {"kl": _listed(at), "score": _listed(listed.optimal.score_at(at))}
        found["best_of_n"] = [
            _baseline(listed.best_of_n(n), n=n, folklore=folklore_kl(n)) for n in counts
        ]
        return found
    drawn = (pool["score"], pool["logp"]) if pool else (base.score, base.logp)
    scores, logps = (np.array(values, dtype=float) for values in drawn)
    found["samples"] = count = scores.shape[1]
    if np.isnan(scores).any():
        found["words"] = "no baselines: some of the base's samples have no score"
        return found
    able = [n for n in counts if n <= count]
    found["best_of_n"] = [
        _baseline(best_of_n(scores, logps, n), n=n, folklore=folklore_kl(n)) for n in able
    ]
    spread = float(scores.std()) or 1.0
    found["tilted"] = [
        _baseline(tilted_optimum(scores, t * spread), beta=t * spread) for t in TILTS
    ]
    return found


def _baseline(found: Baseline, **said: float) -> Found:
    row: Found = {
        **said,
        **{
            name: _plain(mean_interval(getattr(found, name), draws=DRAWS))
            for name in ("kl", "score")
        },
    }
    return row if found.effective is None else {**row, "effective": float(found.effective.mean())}


def _samples(points: Sequence[Point], measured: dict[str, Found | None], base: Measured) -> Found:
    """The first completion of a few prompts before and after; after: of each label the run that
    scored best.
    """
    best: dict[str, tuple[float, Measured]] = {}
    for point in points:
        found = measured[point.name]
        if found is not None:
            score = float(np.nanmean(found["measured"].score))
            if point.label not in best or score > best[point.label][0]:
                best[point.label] = (score, found["measured"])
    places = np.unique(
        np.linspace(0, len(base.prompts) - 1, SHOWN_PROMPTS).round().astype(int)
    ).tolist()

    def shown(found: Measured, place: int) -> Found:
        assert found.score is not None
        return {"text": found.texts[place][0], "score": float(found.score[place, 0])}

    rows = [
        {
            "prompt": base.prompts[place],
            "before": shown(base, place),
            "after": {label: shown(found, place) for label, (_, found) in best.items()},
        }
        for place in places
    ]
    return {"runs": {label: found.name for label, (_, found) in best.items()}, "rows": rows}


def _pass_rows(
    points: Sequence[Point],
    measured: dict[str, Found | None],
    base: Measured,
    correct: float | None,
) -> list[Found]:
    """pass@k and majority@k of the base and of every run; none without `compare.correct`."""
    if correct is None:
        return []
    models = [
        ("base", base),
        *((p.name, found["measured"]) for p in points if (found := measured[p.name]) is not None),
    ]
    rows = []
    for name, found in models:
        right = found.score >= correct
        n = right.shape[1]
        counts = [k for k in (1 << i for i in range(11)) if k <= n]
        majority = [
            float(
                np.mean(
                    [
                        majority_at_k([t.strip() for t in row], list(mark), k)
                        for row, mark in zip(found.texts, right)
                    ]
                )
            )
            for k in counts
        ]
        passed = [pass_at_k(right.sum(1).tolist(), n, k) for k in counts]
        rows.append({"name": name, "k": counts, "pass": passed, "majority": majority})
    return rows


def _training(point: Point) -> Found:
    """A curve of one metric over the steps, thinned: the first that the run logged of reward, KL,
    margin and loss.
    """
    rows = read_lines(Path(point.recipe.output_dir) / "metrics.jsonl")
    names = ("reward", "kl", "rewards/margins", "loss")
    name = next((n for n in names if rows and n in rows[-1]), None)
    if name is None:
        return {"metric": None, "step": [], "value": []}
    width = max(1, math.ceil(len(rows) / 100))
    chunks = [rows[i : i + width] for i in range(0, len(rows), width)]
    values = [float(np.mean([row[name] for row in chunk if name in row])) for chunk in chunks]
    return {"metric": name, "step": [chunk[-1]["step"] for chunk in chunks], "value": values}


def _plain(found: Interval) -> Found:
    return {"value": found.value, "low": found.low, "high": found.high, "level": found.level}


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _finite(value: Any) -> Any:
    """JSON has no nan: null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    value = _listed(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
