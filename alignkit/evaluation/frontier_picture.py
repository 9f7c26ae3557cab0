"""Score against KL of the models of one `alignkit eval`, with the price in the legend."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from alignkit.evaluation.drawing import COLOURS, MARKERS, STYLE, save_picture

Row = Mapping[str, Any]  # one JSON object


def draw_frontier(results: Row, file: Path) -> bool:
    """Write the picture; False where no model has a score, so that there is nothing to draw."""
    if results["base"]["figures"].get("score") is None:
        return False
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 5.4))
        _draw_surroundings(axes, results)
        for place, model in enumerate(results["models"]):
            _draw_model(axes, model, place)
        _join(axes, results["models"])

        axes.set(xlabel="KL to the reference, nats per completion", ylabel="mean score")
        axes.set_title("what is gained at which distance and price", loc="left", fontsize=11)
        figure.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, fontsize=10)
        figure.tight_layout()
        save_picture(figure, file)
    return True


def _draw_surroundings(axes: Axes, results: Row) -> None:
    """The reference, best of n without training, and where it is known the best possible line."""
    base = results["base"]
    exact = base.get("exact")
    start = exact["score"] if exact else base["figures"]["score"]["value"]
    axes.plot([0], [start], "s", color="black", label="reference", markersize=7)

    optimal = results["optimal"]
    if optimal:
        line: dict[str, Any] = {"color": "black", "linewidth": 2.6, "alpha": 0.55}
        axes.plot(optimal["kl"], optimal["score"], label="best possible", **line)

    largest = max((m["figures"]["kl"]["value"] for m in results["models"]), default=0.0)
    rows = [row for row in results["baselines"] if row["kl"] <= 1.3 * largest + 0.1]
    if rows:
        ring: dict[str, Any] = {"color": "black", "markerfacecolor": "white", "markersize": 6}
        label = f"best of {', '.join(str(row['n']) for row in rows)}"
        axes.plot([r["kl"] for r in rows], [r["score"] for r in rows], "o", label=label, **ring)


def _draw_model(axes: Axes, model: Row, place: int) -> None:
    """A point with an upright bar for the score and, of a KL interval, one that lies."""
    means = model["figures"]
    score = means["score"]
    kl = means["kl"]["value"]
    colour = COLOURS[place % len(COLOURS)]
    if means.get("kl_low") is not None:
        low = means["kl_low"]["value"]
        axes.plot([low, kl], [score["value"]] * 2, color=colour, linewidth=5, alpha=0.45)
    axes.plot([kl] * 2, [score["low"], score["high"]], color=colour, linewidth=1.4)

    tokens = means["sampled"]["value"]
    calls = means["reward_calls"]["value"]
    price = f"{tokens:.0f} tokens" + (f", {calls:.0f} reward calls" if calls else "")
    marker = MARKERS[place % len(MARKERS)]
    label = f"{model['name']} ({price})"
    axes.plot([kl], [score["value"]], marker, color=colour, markersize=8, label=label)


def _join(axes: Axes, models: list[Row]) -> None:
    """A line through the models of one merge, from the smallest share to the largest, and one
    through rounds of training.
    """
    curves: dict[str, list[tuple[float, Row]]] = {}
    for model in models:
        place = model.get("merge") or model.get("round")
        if place:
            curves.setdefault(place["of"], []).append((place["share"], model))

    for curve in curves.values():
        of = [model for _, model in sorted(curve, key=lambda each: each[0])]
        kl = [model["figures"]["kl"]["value"] for model in of]
        score = [model["figures"]["score"]["value"] for model in of]
        axes.plot(kl, score, color="#666666", linewidth=1.2, zorder=1)
