"""The table that `alignkit eval` prints: a row for each figure, a column for each model."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from alignkit.config.escaping import plain
from alignkit.metrics.repeated import CoverageCurve

Results = Mapping[str, Any]  # of `evaluate`, or of one model in it

FIGURES = {
    "score": "score",
    "kl": "KL to the reference, nats",
    "kl_per_token": "KL per token, nats",
    "kl_k1": "KL by log-ratios (k1), nats",
    "forward_kl": "forward KL, nats",
    "entropy": "entropy, nats",
    "length": "length, tokens",
    "ended": "share that ended by itself",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "episodes/turns": "turns per episode",
    "episodes/length": "tokens of an episode, the world's included",
    "episodes/failed": "share of episodes that failed",
    "tools/call_frequency": "tool calls per episode",
    "tools/failure_frequency": "share of calls that failed",
}
PRICE = {
    "sampled": "tokens computed per completion",
    "reward_calls": "reward calls per completion",
}
EXACT = {"score": "exact score", "kl": "exact KL, nats", "efficiency": "efficiency"}
AT_K = {
    "pass_at_k": "pass@{}",
    "majority_at_k": "majority@{}",
    "verified_at_k": "first accepted of {} is right",
}

TITLE = (
    "{prompts} prompts, {samples} completions each, up to {max_new_tokens} tokens; "
    "reference {reference}"
)
BASELINE = "best of {n} of the base: score {score:.3f} at KL {kl:.3f} (at most {kl_bound:.3f})"


def show(results: Results, console: Console) -> None:
    """Print the results of `evaluate`: intervals are 95 % over prompts."""
    models = [results["base"], *results["models"]]
    table = Table(title=plain(TITLE.format(**results["settings"])))
    for heading in ("mean [95 % over prompts]", *(model["name"] for model in models)):
        table.add_column(plain(heading))
    for name, words in FIGURES.items():
        cells = [_interval(model["figures"].get(name)) for model in models]
        if name == "kl":
            cells = [_bounds(model) or cell for model, cell in zip(models, cells)]
        _row(table, words, cells)
    if any("decode" in model for model in models):
        for name, words in PRICE.items():
            _row(table, words, [_number(model["figures"][name]["value"]) for model in models])
    for name, words in EXACT.items():
        _row(table, words, [_number(_inner(model, "exact", name)) for model in models])
    _row(table, "nats from its own optimum", [_distance(model) for model in models])
    _add_wins(table, models)
    for name, words in AT_K.items():
        for k in models[0].get(name, ()):
            _row(table, words.format(k), [_number(model[name][k]) for model in models])
    _row(table, "coverage by the curve, k = 1000", [_coverage(model) for model in models])
    _add_held_out(table, models)
    console.print(table)
    _show_map(results.get("model_map") or {}, console)

    for baseline in results["baselines"]:
        console.print(plain(BASELINE.format(**baseline)))
    for verdict in results["verdicts"]:
        console.print(plain(f"score: {verdict}"))


def _show_map(distances: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """KL between each two models, where there are several."""
    if len(distances) < 3:  # the base and one model: the table has their KL
        return
    table = Table(title="KL between models by their log-likelihoods of the base's samples, nats")
    for heading in ("", *distances):
        table.add_column(plain(heading))
    for name, row in distances.items():
        table.add_row(*map(plain, (name, *(_number(value) for value in row.values()))))
    console.print(table)


def _coverage(model: Results) -> str:
    curve = model.get("coverage")
    return "" if curve is None else _number(CoverageCurve(**curve).at(1000))


def _add_wins(table: Table, models: Sequence[Results]) -> None:
    # Invalid verdicts get a row only where there are some.
    invalid = [_inner(model, "win_rate", "invalid") or None for model in models]
    controlled = [model.get("length_controlled_win_rate") for model in models]
    _row(table, "win rate over the base", [_interval(model.get("win_rate")) for model in models])
    _row(table, "verdicts that are invalid", [_number(value) for value in invalid])
    _row(table, "win rate, length-controlled", [_number(value) for value in controlled])


def _add_held_out(table: Table, models: Sequence[Results]) -> None:
    accuracies = [_inner(model, "preferences", "accuracy") for model in models]
    errors = [_inner(model, "preferences", "calibration_error") for model in models]
    unrelated = [model.get("kl_unrelated") for model in models]
    _row(table, "accuracy on held-out pairs", [_number(value) for value in accuracies])
    _row(table, "its calibration error", [_number(value) for value in errors])
    _row(table, "KL on unrelated prompts, nats", [_interval(interval) for interval in unrelated])
    _row(table, "perplexity of held-out text", _perplexities(models))


def _row(table: Table, words: str, cells: Sequence[str]) -> None:
    """Figures that no model has are left out."""
    if any(cells):
        table.add_row(words, *map(plain, cells))


def _inner(model: Results, section: str, name: str) -> float | None:
    """A number of a section that not every model has."""
    return (model.get(section) or {}).get(name)


def _interval(interval: Results | None) -> str:
    if interval is None:
        return ""
    if interval["low"] is None:
        return _number(interval["value"])
    low = _number(interval["low"])
    high = _number(interval["high"])
    return f"{_number(interval['value'])} [{low}, {high}]"


def _bounds(model: Results) -> str:
    """The KL of a decoder of which only an interval is known, with its sampling error."""
    means = model["figures"]
    if means.get("kl_low") is None:
        return ""
    error = _number(model["standard_errors"]["kl"])
    return f"{_number(means['kl_low']['value'])} to {_number(means['kl']['value'])} ± {error}"


def _distance(model: Results) -> str:
    ends = model.get("distance")
    if ends is None:
        return ""
    low, high = (_number(ends[end]["value"]) for end in ("low", "high"))
    return f"{low} to {high} (beta {ends['beta']:g})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _perplexities(models: Sequence[Results]) -> list[str]:
    """The base's is measured with every model."""
    base = next(
        (model["perplexity"]["reference"] for model in models if "perplexity" in model), None
    )
    trained = [_inner(model, "perplexity", "policy") for model in models[1:]]
    return [_number(value) for value in (base, *trained)]
