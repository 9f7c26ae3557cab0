"""What `alignkit eval` does: measure finished models, each in the same way.

`alignkit.evaluation.request.checked` refuses what can be refused without importing torch; the
command line calls it before it imports this file.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from alignkit import files
from alignkit.config.objective import build_objective
from alignkit.config.recipe import Recipe
from alignkit.data.load import load_prompts
from alignkit.data.read import Source, held_out
from alignkit.evaluation.decoded import listed_law, measure_decoder
from alignkit.evaluation.distance import distance, reference_scores
from alignkit.evaluation.exact import Listed
from alignkit.evaluation.measure import (
    Yardstick,
    evaluation_pair,
    perplexity,
    preference_margins,
)
from alignkit.evaluation.measurements import Measured, wins
from alignkit.evaluation.request import Request, checked, data_of, labels_of
from alignkit.evaluation.samples import shown_samples, token_log_ratios
from alignkit.evaluation.shared import Shared, first_recipe, shared_of
from alignkit.evaluation.table import show
from alignkit.metrics.baselines import best_of_n, folklore_kl
from alignkit.metrics.comparisons import compare_means
from alignkit.metrics.completions import (
    length_controlled_win_rate,
    majority_at_k,
    pass_at_k,
    preference_calibration,
    win_rate,
)
from alignkit.metrics.frontier import efficiency
from alignkit.metrics.intervals import Array
from alignkit.metrics.repeated import fit_coverage, model_map, verified_at_k
from alignkit.policies.pair import PolicyPair
from alignkit.runs.merge import merge_of

BEST_OF = (2, 4, 8, 16, 32, 64)

Results = dict[str, Any]  # JSON


def evaluate_to_file(request: Request, file: Path, page: Path | None = None) -> None:
    """Print the table of `evaluate` and write its results to `file`, and as one page to `page`.

    ResourceError where the disk refuses: a folder that cannot be made before anything is measured,
    a full disk after the table was printed.
    """
    for each in (file, page):
        if each is not None:
            with files.writing(each):
                each.parent.mkdir(parents=True, exist_ok=True)
    write_results(evaluate(request), file, page)


def write_results(results: Results, file: Path, page: Path | None = None) -> None:
    """Print results as a table and write them to `file`, and as one page to `page`. ResourceError
    where the disk refuses.
    """
    console = Console()
    if not console.is_terminal:  # a file has no width: give every model its column
        console = Console(width=40 + 28 * (1 + len(results["models"])))
    show(results, console)
    with files.writing(file):
        files.write_json(file, results)
    if page is not None:
        from alignkit.evaluation.page import write_page  # needs matplotlib

        write_page(results, page)


def evaluate(request: Request) -> Results:
    """Results of every model as JSON: `settings`, `base`, `models`, `baselines`, `verdicts`.

    ModelError (exit 4) for models that cannot be loaded or whose tokens are not the reference's,
    DataError (3) for data that cannot be used, ConfigError (2) where nothing says on which prompts.
    """
    shared = shared_of(checked(request))
    request = shared.request

    measured = {"base": shared.base}
    credits: dict[str, Any] = {}
    scores = None if request.distance is None else reference_scores(shared, request.distance)
    models = []
    for name, label in zip(request.models, labels_of(request.models)):
        if name in request.decoders:
            measured[label], own = _decoder(shared, name, label)
        else:
            measured[label], own = _model(shared, name, label, scores)
        credits[label] = own.pop("credit", None)
        common = {**_summary(request, measured[label]), **_wins(shared, measured[label])}
        models.append({"name": label, "model": name, **common, **own})

    base = {"name": "base", **_summary(request, shared.base)}
    if shared.listed is not None:
        base["exact"] = {"score": float(shared.listed.base.mean()), "kl": 0.0}
    every_result = {
        "settings": _settings(shared),
        "base": base,
        "models": models,
        "baselines": _baselines(shared.base, shared.listed),
        "optimal": _optimal(shared.listed, measured),
        "samples": shown_samples(measured, credits),
        "verdicts": _verdicts(measured),
        "model_map": _map(measured),
    }
    return _without_nan(every_result)


def _model(shared: Shared, name: str, label: str, scores: Array | None) -> tuple[Measured, Results]:
    """A finished model: its samples, and what only trained models have."""
    pair = evaluation_pair(name, shared.reference)
    measured = shared.yardstick.measure(pair, label, base=shared.base)
    credit = None
    if shared.request.credit:
        credit = token_log_ratios(pair, shared.yardstick.prompts, measured)
    return measured, {
        "credit": credit,
        **merge_of(name),
        **({} if scores is None else distance(shared, name, measured, scores)),
        **_exact(shared.listed, pair),
        **_preferences(shared, name, pair),
        **_forgetting(shared, pair),
    }


def _decoder(shared: "Shared", name: str, label: str) -> tuple[Measured, Results]:
    """A decoder: its samples, and the section that it was made from."""
    config = shared.request.decoders[name]
    measured = measure_decoder(
        config, shared.yardstick, shared.reference, label, safe=shared.request.safe
    )
    results: Results = {"decode": config.model_dump(mode="json", exclude_defaults=True)}
    exact = None
    if shared.listed is not None and config.model == shared.request.reference:
        exact = listed_law(config, shared.listed)
    return measured, {**results, **_exact_means(shared.listed, exact)}


def _settings(shared: Shared) -> Results:
    return {
        "reference": shared.request.reference,
        "prompts": len(shared.base.prompts),
        "samples": shared.yardstick.samples,
        "max_new_tokens": shared.yardstick.max_new_tokens,
        "seed": shared.yardstick.seed,
    }


def _summary(request: Request, measured: Measured) -> Results:
    """Means with their intervals, sampling errors, and where
    `correct` is given also pass@k and majority@k.
    """
    results: Results = {
        "figures": {name: asdict(interval) for name, interval in measured.summary().items()},
        "standard_errors": measured.standard_errors(),
    }
    if measured.score is None or request.correct is None:
        return results

    right = measured.score >= request.correct
    n = measured.score.shape[1]
    powers = [2**i for i in range(n.bit_length()) if 2**i <= n]
    answers = [
        ([text.strip() for text in texts], marks.tolist())
        for texts, marks in zip(measured.texts, right)
    ]
    results["pass_at_k"] = {k: pass_at_k(right.sum(1).tolist(), n, k) for k in powers}
    results["majority_at_k"] = {
        k: sum(majority_at_k(texts, marks, k) for texts, marks in answers) / len(answers)
        for k in powers
    }
    counts = right.sum(1).tolist()
    curve = fit_coverage(results["pass_at_k"])
    if curve is not None:
        results["coverage"] = asdict(curve)
    if request.wrongly_accepted is not None:
        results["verified_at_k"] = {
            k: verified_at_k(counts, n, k, wrongly_accepted=request.wrongly_accepted)
            for k in powers
        }
    return results


def _wins(shared: Shared, measured: Measured) -> Results:
    """How often a model's completion beats the base's, plainly and at equal lengths."""
    verdicts = wins(measured, shared.base, shared.judge)
    if verdicts is None:
        return {}

    probability, valid = verdicts
    plain = win_rate(probability, valid)
    controlled = None
    if valid.any():
        controlled = length_controlled_win_rate(
            probability[valid], measured.lengths[valid], shared.base.lengths[valid]
        )
    return {
        "win_rate": {**asdict(plain.rate), "invalid": plain.invalid},
        "length_controlled_win_rate": controlled,
    }


def _exact(listed: Listed | None, pair: PolicyPair) -> Results:
    """Exact means over the prompts, and which share of the possible gain they reach."""
    return _exact_means(listed, None if listed is None else asdict(listed.figures(pair)))


def _exact_means(listed: Listed | None, per_prompt: Mapping[str, Array] | None) -> Results:
    """Means over the prompts of exact results [P], with the efficiency."""
    if listed is None or per_prompt is None:
        return {}
    means: Results = {name: float(values.mean()) for name, values in per_prompt.items()}
    means["efficiency"] = float(efficiency(means["kl"], means["score"], listed.optimal))
    return {"exact": means}


def _preferences(shared: Shared, name: str, pair: PolicyPair) -> Results:
    """Accuracy on held-out pairs, and calibration where the run's objective has an implicit reward."""
    request = shared.request
    recipe = request.recipes.get(name)
    objective = None
    if recipe is not None and not recipe.data.has_streams:
        objective = build_objective(recipe.objective, recipe.origin, safe=request.safe)

    source = _held_out_pairs(
        shared, recipe, objective is not None and objective.plan.data == "pair"
    )
    if source is None:
        return {}

    data = data_of(recipe, given=request.pairs is not None)
    own = preference_margins(pair, source, data, objective=objective) if objective else None
    margins = own if own is not None else preference_margins(pair, source, data)
    assert margins is not None
    calibration = preference_calibration(margins)
    results: Results = {"pairs": len(margins), "accuracy": calibration.accuracy}
    if own is not None:
        results["calibration_error"] = calibration.error
        results["bins"] = {
            "confidences": calibration.confidences.tolist(),
            "accuracies": calibration.accuracies.tolist(),
            "counts": calibration.counts.tolist(),
        }
    return {"preferences": results}


def _held_out_pairs(shared: Shared, recipe: Recipe | None, learns_pairs: bool) -> Source | None:
    """The request's pairs, else, of a run that learned from pairs, its held-out rows or its task's."""
    task = shared.task
    source: Source | None = shared.request.pairs
    if source is None and recipe is not None and learns_pairs:
        source = held_out(recipe.data)

    if (source is None and learns_pairs) or str(source).startswith("task:"):
        return task.rows("pair", "eval") if task else None
    return source


def _forgetting(shared: Shared, pair: PolicyPair) -> Results:
    """What training changed that it had nothing to do with: KL on other prompts, perplexity."""
    request = shared.request
    data = data_of(first_recipe(request), given=True)
    results: Results = {}
    if request.unrelated is not None:
        prompts, _ = load_prompts(data, pair.tokenizer, source=request.unrelated)
        same = shared.yardstick
        other = Yardstick(prompts, same.samples, same.max_new_tokens, same.seed)
        results["kl_unrelated"] = asdict(other.measure(pair, "unrelated").summary()["kl"])
    if request.text is not None:
        results["perplexity"] = asdict(perplexity(pair, request.text, data))
    return results


def _baselines(base: Measured, listed: Listed | None) -> list[Results]:
    """Best of n without training: exact where outcomes can be
    listed, else estimated from the base's samples.
    """
    if base.score is None or math.isnan(base.score.sum()):
        return []

    rows = []
    for n in [n for n in BEST_OF if n <= base.score.shape[1]]:
        best = listed.best_of_n(n) if listed else best_of_n(base.score, base.reference_logp, n)
        rows.append(
            {
                "n": n,
                "score": float(best.score.mean()),
                "kl": float(best.kl.mean()),
                "kl_bound": folklore_kl(n),
            }
        )
    return rows


def _optimal(listed: Listed | None, measured: Mapping[str, Measured]) -> Results | None:
    """The best score that any policy can have, over the KLs that were measured; None where outcomes
    cannot be listed.
    """
    if listed is None:
        return None
    largest = max(float(np.nanmean(each.kl)) for each in measured.values())
    kl, score = listed.optimal.curve(min(1.2 * largest + 0.1, listed.optimal.max_kl), 61)
    return {"kl": kl.tolist(), "score": score.tolist()}


def _verdicts(measured: Mapping[str, Measured]) -> list[str]:
    """One sentence for each two models: whether one scores higher."""
    scores = {
        name: model.per_prompt()["score"]
        for name, model in measured.items()
        if model.score is not None
    }
    return [comparison.verdict for comparison in compare_means(scores)]


def _map(measured: Mapping[str, Measured]) -> dict[str, dict[str, float]]:
    """KL between each two models by their log-probs of the base's samples; of the base and those
    models whose law is known token by token. {} for episodes.
    """
    vectors = {
        name: model.logp if name == "base" else model.forward_logp
        for name, model in measured.items()
    }
    given = {name: vector for name, vector in vectors.items() if vector is not None}
    return model_map(given) if len(given) > 1 else {}


def _without_nan(value: Any) -> Any:
    """The same with null for nan and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
