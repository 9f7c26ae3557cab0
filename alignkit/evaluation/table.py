"""The table that `alignkit eval` prints: a row for each figure, a column for each model."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Found = Mapping[str, Any]
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
}


def show(found: Found, console: Console) -> None:
    """Print the figures of `evaluate`: intervals are 95 % over prompts."""
    models = [found["base"], *found["models"]]
    settings = found["settings"]
    title = "{prompts} prompts, {samples} completions each, up to {max_new_tokens} tokens; reference {reference}"
    table = Table(
        "mean [95 % over prompts]",
        *(model["name"] for model in models),
        title=title.format(**settings),
    )
    for name, words in FIGURES.items():
        _row(table, words, [_interval(model["figures"].get(name)) for model in models])
    for name, words in {
        "score": "exact score",
        "kl": "exact KL, nats",
        "efficiency": "efficiency",
    }.items():
        _row(table, words, [_number(model.get("exact", {}).get(name)) for model in models])
    _row(table, "win rate over the base", [_interval(model.get("win_rate")) for model in models])
    _row(
        table,
        "verdicts that are invalid",
        [_number((model.get("win_rate") or {}).get("invalid") or None) for model in models],
    )
    _row(
        table,
        "win rate, length-controlled",
        [_number(model.get("length_controlled_win_rate")) for model in models],
    )
    for name, words in {"pass_at_k": "pass@{}", "majority_at_k": "majority@{}"}.items():
        for k in models[0].get(name, ()):
            _row(table, words.format(k), [_number(model[name][k]) for model in models])
    _row(
        table,
        "accuracy on held-out pairs",
        [_number(model.get("preferences", {}).get("accuracy")) for model in models],
    )
    _row(
        table,
        "its calibration error",
        [_number(model.get("preferences", {}).get("calibration_error")) for model in models],
    )
    _row(
        table,
        "KL on unrelated prompts, nats",
        [_interval(model.get("kl_unrelated")) for model in models],
    )
    _row(table, "perplexity of held-out text", _perplexities(models))
    console.print(table)
    for row in found["baselines"]:
        console.print(
            "best of {n} of the base: score {score:.3f} at KL {kl:.3f} (at most {kl_bound:.3f})".format(
                **row
            )
        )
    for verdict in found["verdicts"]:
        console.print(f"score: {verdict}", highlight=False, markup=False)


def _row(table: Table, words: str, cells: Sequence[str]) -> None:
    """Figures that no model has are left out."""
    if any(cells):
        table.add_row(words, *cells)


def _interval(found: Found | None) -> str:
    if found is None:
        return ""
    if found["low"] is None:
        return _number(found["value"])
    return f"{_number(found['value'])} [{_number(found['low'])}, {_number(found['high'])}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _perplexities(models: Sequence[Found]) -> list[str]:
    """The base's is measured with every model."""
    known = [model["perplexity"] for model in models if "perplexity" in model]
    return [
        _number(known[0]["reference"]) if known else "",
        *(_number(m.get("perplexity", {}).get("policy")) for m in models[1:]),
    ]
