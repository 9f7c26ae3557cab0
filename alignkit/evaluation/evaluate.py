"""What `alignkit eval` does: figures of finished models, each measured alike. Importing this
imports no torch.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.config.objective import build_objective
from alignkit.config.recipe import Recipe
from alignkit.config.rollout import MAX_NEW_TOKENS
from alignkit.errors import ConfigError
from alignkit.evaluation.request import Request, checked, data_of, labels_of, task_of
from alignkit.runs.trained_model import find_finished, load_finished

if TYPE_CHECKING:
    from alignkit.data.prompts import Prompt
    from alignkit.evaluation.exact import Listed
    from alignkit.evaluation.measure import Yardstick
    from alignkit.evaluation.measurements import Measured
    from alignkit.policies.pair import PolicyPair
    from alignkit.rollout.generate import OneModel
    from alignkit.tasks import Task

BEST_OF = (2, 4, 8, 16, 32, 64)
Found = dict[str, Any]


def evaluate(request: Request) -> Found:
    """Figures of every model as JSON: `settings`, `base`, `models`, `baselines`, `verdicts`.

    ModelError (exit 4) for models that cannot be loaded or whose tokens are not the reference's,
    DataError (3) for data that cannot be used, ConfigError (2) where nothing says on which prompts.
    """
    request = checked(request)
    from alignkit.evaluation.measure import evaluation_pair  # after what can be refused at once

    assert request.reference is not None
    task = task_of(request)
    reference = load_finished(request.reference)
    pair = evaluation_pair(request.reference, reference)
    yardstick = _yardstick(request, task, reference)
    listed = _listed(request, task, yardstick)
    judge = _judge(request, task)
    base = yardstick.measure_reference(pair)
    labels = labels_of(request.models)
    measured = {"base": base}
    models = []
    for name, label in zip(request.models, labels):
        pair = evaluation_pair(name, reference)
        measured[label] = yardstick.measure(pair, label, base=base)
        found = _figures(request, measured[label]) | _wins(measured[label], base, judge)
        found |= (
            _exact(listed, pair)
            | _preferences(request, name, task, pair)
            | _forgetting(request, yardstick, pair)
        )
        models.append({"name": label, "model": name, **found})
    settings = {
        "reference": request.reference,
        "prompts": len(base.prompts),
        "samples": yardstick.samples,
        "max_new_tokens": yardstick.max_new_tokens,
        "seed": yardstick.seed,
    }
    exact = {} if listed is None else {"exact": {"score": float(listed.base.mean()), "kl": 0.0}}
    found = {
        "settings": settings,
        "base": {"name": "base", **_figures(request, base), **exact},
        "models": models,
        "baselines": _baselines(base, listed),
        "verdicts": _verdicts(measured),
    }
    return _finite(found)


def _yardstick(request: Request, task: "Task | None", reference: "OneModel") -> "Yardstick":
    from alignkit.evaluation.measure import Yardstick
    from alignkit.policies.module import context_length
    from alignkit.rewards import load_rewards

    recipe = next(iter(request.recipes.values()), None)
    prompts = _prompts(request, task, reference, recipe)
    if request.reward is not None:
        reward: Any = load_rewards([{"function": request.reward}], safe=request.safe)
    elif recipe is not None and recipe.rewards:
        reward = load_rewards(recipe.rewards, safe=request.safe)
    else:
        reward = task.reward if task else None
    room = context_length(reference.network) - max(len(prompt.ids) for prompt in prompts)
    wanted = request.max_new_tokens or min(
        room, recipe.rollout.max_new_tokens if recipe else MAX_NEW_TOKENS
    )
    return Yardstick(prompts, request.samples, wanted, request.seed, reward)


def _prompts(
    request: Request, task: "Task | None", reference: "OneModel", recipe: Recipe | None
) -> "list[Prompt]":
    from alignkit.data.load import load_prompts

    source: Any = (
        request.prompts
        or (recipe.data.eval if recipe else None)
        or (f"task:{task.name}" if task else None)
    )
    if source is None:
        raise ConfigError(
            "nothing says which prompts to measure on; give --prompts FILE (rows with `prompt`) or task:NAME"
        )
    if source.startswith("task:"):
        assert task is not None
        source = task.rows("rollout", "eval")
    return load_prompts(
        data_of(recipe, given=request.prompts is not None), reference.tokenizer, source=source
    )[0]


def _judge(request: Request, task: "Task | None") -> Any:
    """Who says which completion wins: the runs' judge, else their task's; None: the score."""
    from alignkit.judges import load_judge

    recipe = next(iter(request.recipes.values()), None)
    if recipe is not None and recipe.judge is not None:
        return load_judge(recipe.judge, safe=request.safe)
    return task.judge if task else None


def _wins(measured: "Measured", base: "Measured", judge: Any) -> Found:
    """How often a model's completion beats the base's, plainly and at equal lengths."""
    from alignkit.evaluation.measurements import wins
    from alignkit.metrics.completions import length_controlled_win_rate, win_rate

    verdicts = wins(measured, base, judge)
    if verdicts is None:
        return {}
    probability, valid = verdicts
    found = win_rate(probability, valid)
    lengths = measured.lengths[valid], base.lengths[valid]
    controlled = length_controlled_win_rate(probability[valid], *lengths) if valid.any() else None
    return {
        "win_rate": {**asdict(found.rate), "invalid": found.invalid},
        "length_controlled_win_rate": controlled,
    }


def _figures(request: Request, measured: "Measured") -> Found:
    """Summary, sampling errors, pass@k and majority@k."""
    from alignkit.metrics.completions import majority_at_k, pass_at_k

    found: Found = {
        "figures": {name: asdict(interval) for name, interval in measured.summary().items()},
        "standard_errors": measured.standard_errors(),
    }
    if measured.score is not None and request.correct is not None:
        right = measured.score >= request.correct
        n = measured.score.shape[1]
        ks = [2**i for i in range(n.bit_length()) if 2**i <= n]
        votes = [
            ([text.strip() for text in row], marks.tolist())
            for row, marks in zip(measured.texts, right)
        ]
        found["pass_at_k"] = {k: pass_at_k(right.sum(1).tolist(), n, k) for k in ks}
        found["majority_at_k"] = {
            k: sum(majority_at_k(*vote, k) for vote in votes) / len(votes) for k in ks
        }
    return found


def _listed(request: Request, task: "Task | None", yardstick: "Yardstick") -> "Listed | None":
    """Exact figures, where the reference is a task's model, the score its own reward, and its
    outcomes can be listed.
    """
    from alignkit.evaluation.exact import Listed, listed_reviews

    assert request.reference is not None
    if (
        task is None
        or yardstick.reward != task.reward
        or find_finished(request.reference) != task.model_folder
    ):
        return None
    world = listed_reviews(task.name)
    return Listed(world, task.model_folder) if world else None


def _exact(listed: "Listed | None", pair: "PolicyPair") -> Found:
    from alignkit.metrics.frontier import efficiency

    if listed is None:
        return {}
    found = {key: float(values.mean()) for key, values in asdict(listed.figures(pair)).items()}
    return {
        "exact": found
        | {"efficiency": float(efficiency(found["kl"], found["score"], listed.optimal))}
    }


def _preferences(request: Request, name: str, task: "Task | None", pair: "PolicyPair") -> Found:
    """Accuracy on held-out pairs, and calibration where the run's objective has an implicit reward."""
    from alignkit.evaluation.measure import preference_margins
    from alignkit.metrics.completions import preference_calibration

    recipe = request.recipes.get(name)
    objective = (
        build_objective(recipe.objective, recipe.origin, safe=request.safe) if recipe else None
    )
    learns_pairs = objective is not None and objective.plan.data == "pair"
    source: Any = request.pairs or (recipe.data.eval if recipe and learns_pairs else None)
    if (source is None and task and learns_pairs) or (source or "").startswith("task:"):
        source = task.rows("pair", "eval") if task else None
    if source is None:
        return {}
    data = data_of(recipe, given=request.pairs is not None)
    own = preference_margins(pair, source, data, objective=objective) if objective else None
    margins = own if own is not None else preference_margins(pair, source, data)
    assert margins is not None
    calibration = preference_calibration(margins)
    found: Found = {"pairs": len(margins), "accuracy": calibration.accuracy}
    if own is not None:
        bins = {
            key: getattr(calibration, key).tolist()
            for key in ("confidences", "accuracies", "counts")
        }
        found |= {"calibration_error": calibration.error, "bins": bins}
    return {"preferences": found}


def _forgetting(request: Request, yardstick: "Yardstick", pair: "PolicyPair") -> Found:
    from alignkit.data.load import load_prompts
    from alignkit.evaluation.measure import Yardstick, perplexity

    found: Found = {}
    data = data_of(next(iter(request.recipes.values()), None), given=True)
    if request.unrelated is not None:
        prompts, _ = load_prompts(data, pair.tokenizer, source=request.unrelated)
        other = Yardstick(
            prompts, yardstick.samples, yardstick.max_new_tokens, yardstick.seed
        ).measure(pair, "unrelated")
        found["kl_unrelated"] = asdict(other.summary()["kl"])
    if request.text is not None:
        found["perplexity"] = asdict(perplexity(pair, request.text, data))
    return found


def _baselines(base: "Measured", listed: "Listed | None") -> list[Found]:
    """Best of n without training: exact where outcomes can be listed, else estimated from the
    base's samples.
    """
    from alignkit.metrics.baselines import best_of_n, folklore_kl

    if base.score is None or math.isnan(base.score.sum()):
        return []
    rows = []
    for n in [n for n in BEST_OF if n <= base.score.shape[1]]:
        found = listed.best_of_n(n) if listed else best_of_n(base.score, base.reference_logp, n)
        rows.append(
            {
                "n": n,
                "score": float(found.score.mean()),
                "kl": float(found.kl.mean()),
                "kl_bound": folklore_kl(n),
            }
        )
    return rows


def _verdicts(measured: dict[str, "Measured"]) -> list[str]:
    from alignkit.metrics.comparisons import compare_means

    scores = {name: m.per_prompt()["score"] for name, m in measured.items() if m.score is not None}
    return [comparison.verdict for comparison in compare_means(scores)]


def _finite(found: Any) -> Any:
    """The same with null for nan, which JSON does not have."""
    if isinstance(found, dict):
        return {key: _finite(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def evaluate_to_file(request: Request, file: Path) -> None:
    """Print the table of `evaluate` and write its figures to `file`."""
    from rich.console import Console

    from alignkit.evaluation.table import show

    found = evaluate(request)
    console = Console()
    show(
        found,
        console if console.is_terminal else Console(width=40 + 28 * (1 + len(request.models))),
    )
    file.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
