"""Gathers everything that was measured into `results.json`, from which the report is written.

This file has the runs, their win rates, samples and training curves; `frontiers` has what needs
several runs: curves, baselines and verdicts. Everything is plain JSON.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from alignkit.comparison.decoders import decoder_curves, decoder_rows, expand_decoders
from alignkit.comparison.frontiers import (
    DRAWS,
    baseline_rows,
    curve_row,
    curves_of,
    interval_row,
    matched_rows,
    verdict_rows,
)
from alignkit.comparison.grid import Point, section_of
from alignkit.comparison.matching import Search
from alignkit.comparison.measure_run import Measurer
from alignkit.comparison.measurement import Measurement, as_json
from alignkit.comparison.run_state import read_run_state
from alignkit.config.recipe import Recipe, shipped_recipes
from alignkit.evaluation.exact import Listed
from alignkit.evaluation.measurements import Measured
from alignkit.files import read_jsonl, write_json, writing
from alignkit.metrics.completions import (
    length_controlled_win_rate,
    majority_at_k,
    pass_at_k,
    preference_calibration,
    win_rate,
)
from alignkit.metrics.frontier import efficiency
from alignkit.metrics.intervals import mean_interval

SHOWN_PROMPTS = 8
TRAINING_PLACES = 100  # places of a training curve
Row = dict[str, Any]  # one JSON object
NO_CURVE: Row = {"metric": None, "step": [], "value": []}


def gather(
    recipe: Recipe,
    points: Sequence[Point],
    measurer: Measurer,
    stale: Mapping[str, str],
    *,
    search: Search,
    seconds: float,
) -> Row:
    """Collect the results of all `points`, write `results.json` and return its content.

    `stale`: name -> reason of the runs that do not belong to the recipe any more; of them only that
    is said. `search`: how it ended where `compare.match_kl` asks for one; what it found broken is
    on no curve. `seconds`: how long the comparison took, this time.
    """
    section = section_of(recipe)
    base = measurer.read_base()
    assert base is not None, "the base model is measured before the results are gathered"
    measurements = {
        point.name: None if point.name in stale else _finished_measurement(point, measurer)
        for point in points
    }
    listed = measurer.listed

    # Where every outcome can be listed, exact figures take the place of samples.
    base_score = listed.base if listed else base.measured.per_prompt()["score"]
    used = measurements | dict.fromkeys(search.broken())
    curves = curves_of(points, used, exact=listed is not None)
    decoders = expand_decoders(recipe)
    beside = decoder_curves(measurer, decoders)

    results = {
        "recipe": _name(recipe),
        "model": recipe.model.name_or_path,
        "data": ", ".join(source.source for source in recipe.data.sources()),
        "exact": listed is not None,
        "prompts": len(base.measured.prompts),
        "samples": section.samples,
        "seeds": list(section.seeds),
        "seconds": seconds,
        "base": _base_row(base, listed),
        "runs": [
            _run_row(point, measurements[point.name], base.measured, listed, stale.get(point.name))
            for point in points
        ],
        "curves": [curve_row(curve, base_score, listed) for curve in curves],
        "decoders": decoder_rows(measurer, decoders),
        "decoder_curves": [curve_row(curve, base_score, listed) for curve in beside],
        "baselines": baseline_rows(section.best_of, base, listed),
        "verdicts": verdict_rows(curves, base_score, listed, beside),
        "matched": matched_rows(search.rows(), search.price(), curves, base_score, listed),
        "samples_shown": _shown_samples(points, measurements, base.measured),
        "pass_at_k": _pass_rows(points, measurements, base.measured, section.correct),
        "training": _training_rows(points, stale),
    }
    results = as_json(results)
    file = Path(recipe.output_dir) / "results.json"
    with writing(file):
        write_json(file, results)
    return results


def _base_row(base: Measurement, listed: Listed | None) -> Row:
    """The base model's means, with its exact score where there is one."""
    row = _summary(base.measured)
    if listed:
        row["score"] = interval_row(mean_interval(listed.base))
    return row


def _training_rows(points: Sequence[Point], stale: Mapping[str, str]) -> Row:
    """The training curve of each run; none of those that do not belong to the recipe any more."""
    return {
        point.name: NO_CURVE if point.name in stale else _training_curve(point) for point in points
    }


def _name(recipe: Recipe) -> str:
    """The recipe's name on a command line: its bare name where it ships with the package."""
    file = Path(recipe.origin.name)
    return next((name for name, shipped in shipped_recipes().items() if shipped == file), str(file))


def _finished_measurement(point: Point, measurer: Measurer) -> Measurement | None:
    """The measurement of a finished run; None for a run that failed or is not measured."""
    return measurer.read_run(point) if read_run_state(point).status == "finished" else None


def _run_row(
    point: Point,
    measurement: Measurement | None,
    base: Measured,
    listed: Listed | None,
    why_stale: str | None,
) -> Row:
    """One row of the table of runs; of a run without a measurement only its state."""
    state = read_run_state(point)
    row: Row = {
        "name": point.name,
        "label": point.label,
        "swept": dict(point.swept),
        "seed": point.seed,
        "status": "stale" if why_stale else state.status,
        "reason": why_stale or state.reason,
        "seconds": state.seconds,
        "cpu_seconds": state.cpu_seconds,
        "objective": point.recipe.objective,
    }
    if measurement is None:
        return row

    row["figures"] = _summary(measurement.measured)
    row["standard_errors"] = measurement.measured.standard_errors()
    row["wins"] = _win_row(measurement, base)
    if measurement.exact is not None and listed is not None:
        exact = {name: float(np.mean(values)) for name, values in measurement.exact.items()}
        share = float(efficiency(exact["kl"], exact["score"], listed.optimal))
        row["exact"] = {**exact, "efficiency": share}
    if measurement.margins is not None:
        row["calibration"] = asdict(preference_calibration(measurement.margins))
    return row


def _summary(measured: Measured) -> Row:
    summary = measured.summary(draws=DRAWS)
    return {name: interval_row(interval) for name, interval in summary.items()}


def _win_row(measurement: Measurement, base: Measured) -> Row:
    """The win rate against the base model, or `words` that say why there is none."""
    assert measurement.wins is not None
    assert measurement.valid is not None
    valid = measurement.valid.astype(bool)
    measured = measurement.measured

    # Equal texts are ties that no judge was asked about, so they do not count as its answers.
    asked = np.array(
        [
            [ours != theirs for ours, theirs in zip(*texts)]
            for texts in zip(measured.texts, base.texts)
        ]
    )
    if asked.any() and not valid[asked].any():
        return {
            "rate": dict.fromkeys(("value", "low", "high")),
            "invalid": 1.0,
            "length_controlled": None,
            "words": f"no win rate: all {asked.sum()} verdicts of the judge are invalid; "
            "look at its answers and its endpoint",
        }

    rate = win_rate(measurement.wins, valid)
    controlled = length_controlled_win_rate(
        measurement.wins[valid], measured.lengths[valid], base.lengths[valid]
    )
    return {
        "rate": interval_row(rate.rate),
        "invalid": rate.invalid,
        "length_controlled": controlled,
        "words": "",
    }


def _shown_samples(
    points: Sequence[Point], measurements: Mapping[str, Measurement | None], base: Measured
) -> Row:
    """The first completion of a few prompts by the base model, and
    by the run of each label that scored best.
    """
    best: dict[str, Measured] = {}
    best_score: dict[str, float] = {}
    for point in points:
        measurement = measurements[point.name]
        if measurement is None:
            continue
        assert measurement.measured.score is not None
        score = float(np.nanmean(measurement.measured.score))
        if point.label not in best or score > best_score[point.label]:
            best[point.label] = measurement.measured
            best_score[point.label] = score

    def shown(measured: Measured, place: int) -> Row:
        assert measured.score is not None
        return {"text": measured.texts[place][0], "score": float(measured.score[place, 0])}

    # Spread over all prompts, the first and the last included.
    places = np.linspace(0, len(base.prompts) - 1, SHOWN_PROMPTS).round().astype(int)
    rows = [
        {
            "prompt": base.prompts[place],
            "before": shown(base, place),
            "after": {label: shown(measured, place) for label, measured in best.items()},
        }
        for place in np.unique(places).tolist()
    ]
    return {"runs": {label: measured.name for label, measured in best.items()}, "rows": rows}


def _pass_rows(
    points: Sequence[Point],
    measurements: Mapping[str, Measurement | None],
    base: Measured,
    correct: float | None,
) -> list[Row]:
    """pass@k and majority@k of the base model and of every run; none without `compare.correct`."""
    if correct is None:
        return []
    models = {"base": base}
    for point in points:
        measurement = measurements[point.name]
        if measurement is not None:
            models[point.name] = measurement.measured

    rows = []
    for name, measured in models.items():
        assert measured.score is not None
        right = measured.score >= correct  # [P, K]
        answers = [[text.strip() for text in row] for row in measured.texts]
        samples = right.shape[1]
        counts = [2**i for i in range(11) if 2**i <= samples]
        majority = [
            float(np.mean([majority_at_k(a, list(r), k) for a, r in zip(answers, right)]))
            for k in counts
        ]
        passed = [pass_at_k(right.sum(1).tolist(), samples, k) for k in counts]
        rows.append({"name": name, "k": counts, "pass": passed, "majority": majority})
    return rows


def _training_curve(point: Point) -> Row:
    """One metric over the steps, thinned by means: the first that the run logged of reward, KL,
    margin and loss.
    """
    rows = read_jsonl(Path(point.recipe.output_dir) / "metrics.jsonl")
    rows = [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]
    names = ("reward", "kl", "rewards/margins", "loss")
    name = next((name for name in names if rows and name in rows[-1]), None)
    if name is None:
        return NO_CURVE

    rows = [row for row in rows if isinstance(row.get(name), int | float)]
    width = max(1, math.ceil(len(rows) / TRAINING_PLACES))
    chunks = [rows[i : i + width] for i in range(0, len(rows), width)]
    return {
        "metric": name,
        "step": [chunk[-1]["step"] for chunk in chunks],
        "value": [float(np.mean([row[name] for row in chunk])) for chunk in chunks],
    }
