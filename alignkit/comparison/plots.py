"""The pictures of a comparison, from what results.json holds. Colours, markers and line styles each
tell the curves apart.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

Found = Mapping[str, Any]
# Okabe & Ito's, two changed
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F3C8D",
    "#4D4D4D",
)
MARKERS = "os^DvPX*"
LINES = ("-", "--", "-.", (0, (1, 1.2)))
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.dpi": 110,
}
KL_AXIS = "KL to the base model, nats per completion"


def draw(results: Found, out: Path) -> dict[str, str]:
    """Write every picture that the results have something for into `out`; name -> file."""
    painters = {
        "frontier": frontier,
        "training": training,
        "calibration": calibration,
        "pass_at_k": pass_at_k,
        "samples": samples,
    }
    files = {}
    with plt.rc_context(STYLE):
        for name, paint in painters.items():
            figure = paint(results)
            if figure is not None:
                figure.savefig(out / f"{name}.png", bbox_inches="tight")
                plt.close(figure)
                _shrink(out / f"{name}.png")
                files[name] = f"{name}.png"
    return files


def _shrink(file: Path) -> None:
    """A palette of 256 colours: a third of the size, to the eye the same."""
    with Image.open(file) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(file, optimize=True)


def styles(results: Found) -> dict[str, dict[str, Any]]:
    """Label -> how its curve looks, the same in every picture."""
    labels = dict.fromkeys(run["label"] for run in results["runs"])
    return {
        label: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": LINES[i % len(LINES)],
        }
        for i, label in enumerate(labels)
    }


def frontier(results: Found) -> Figure | None:
    """Score against KL: curves with bands, baselines, and where it is known the best that any
    policy can do.
    """
    if not results["curves"]:
        return None
    optimal = results["baselines"]["optimal"]
    figure, axes = plt.subplots(
        1, 2 if optimal else 1, figsize=(11.5, 5.2) if optimal else (8, 5.4), squeeze=False
    )
    main = axes[0, 0]
    look = styles(results)
    reach = 1.08 * max(
        point["kl"]["value"] for curve in results["curves"] for point in curve["points"]
    )
    _baselines(main, results, reach)
    for curve in results["curves"]:
        _curve(main, curve, results["base"]["score"]["value"], look[curve["label"]])
    main.set(
        xlabel=KL_AXIS,
        ylabel="expected score" if results["exact"] else "mean score",
        xlim=(-0.02 * reach, reach),
    )
    main.set_title("what is gained at which distance", loc="left", fontsize=11)
    if optimal:
        _efficiency(axes[0, 1], results, look, reach)
    handles, labels = main.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=4 if optimal else 3,
        fontsize=10,
    )
    figure.tight_layout()
    return figure


def _curve(axes: Axes, curve: Found, base: float, look: Mapping[str, Any]) -> None:
    band = curve["band"]
    axes.fill_between(
        band["at"], band["low"], band["high"], color=look["color"], alpha=0.13, linewidth=0
    )
    kl = [0.0, *(point["kl"]["value"] for point in curve["points"])]
    score = [base, *(point["score"]["value"] for point in curve["points"])]
    axes.plot(
        kl,
        score,
        label=curve["label"],
        linewidth=1.8,
        markersize=7,
        markevery=range(1, len(kl)),
        **look,
    )


def _baselines(axes: Axes, results: Found, reach: float) -> None:
    found = results["baselines"]
    if found["optimal"]:
        kl, score = (np.array(found["optimal"][name]) for name in ("kl", "score"))
        seen = kl <= reach * 1.05
        axes.plot(
            kl[seen], score[seen], color="black", linewidth=2.6, alpha=0.55, label="best possible"
        )
    if found["tilted"]:
        rows = [row for row in found["tilted"] if row["kl"]["value"] <= reach]
        points = [(row["kl"]["value"], row["score"]["value"]) for row in rows]
        look = {"color": "black", "linewidth": 1.6, "linestyle": (0, (5, 2)), "alpha": 0.6}
        axes.plot(*zip(*points), label="tilted optimum, estimated", **look)
    shown = [row for row in found["best_of_n"] if row["kl"]["value"] <= reach]
    if shown:
        kl, score = ([row[name]["value"] for row in shown] for name in ("kl", "score"))
        axes.plot(
            kl,
            score,
            "o",
            color="black",
            markerfacecolor="white",
            markersize=8,
            label="best of n samples, no training",
        )
        for row, x, y in zip(shown, kl, score):
            axes.annotate(
                f"n={row['n']}", (x, y), textcoords="offset points", xytext=(7, -12), fontsize=9
            )
    axes.plot(
        0, results["base"]["score"]["value"], "s", color="black", markersize=7, label="base model"
    )


def _efficiency(axes: Axes, results: Found, look: Mapping[str, Any], reach: float) -> None:
    """Share of the best possible gain at the same KL."""
    for curve in results["curves"]:
        points = [
            (p["kl"]["value"], p["efficiency"]) for p in curve["points"] if _known(p["efficiency"])
        ]
        if points:
            axes.plot(*zip(*points), linewidth=1.8, markersize=7, **look[curve["label"]])
    axes.axhline(1.0, color="black", linewidth=2.6, alpha=0.55)
    low = min(
        (
            p["efficiency"]
            for c in results["curves"]
            for p in c["points"]
            if _known(p["efficiency"])
        ),
        default=0.0,
    )
    axes.set(
        xlabel=KL_AXIS,
        xlim=(-0.02 * reach, reach),
        ylim=(max(0.0, 1 - 1.5 * (1 - low)), 1 + 0.1 * (1 - max(low, 0.0))),
    )
    axes.set_title(
        "efficiency: share of the best possible gain at the same KL", loc="left", fontsize=11
    )


def training(results: Found) -> Figure | None:
    """One panel per objective, one line per run."""
    look = styles(results)
    panels = {label: [run for run in results["runs"] if run["label"] == label] for label in look}
    panels = {
        label: runs for label, runs in panels.items() if any(_rows(results, run) for run in runs)
    }
    if not panels:
        return None
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.95 * columns, 2.5 * rows), squeeze=False)
    for place in axes.flat[len(panels) :]:
        place.set_visible(False)
    for place, (label, runs) in zip(axes.flat, panels.items()):
        drawn = [run for run in runs if _rows(results, run)]
        for i, run in enumerate(drawn):
            found = results["training"][run["name"]]
            shade = 0.45 + 0.55 * (i + 1) / len(drawn)
            name = ", ".join(f"{field} {value}" for field, value in run["swept"].items())
            place.plot(
                found["step"],
                found["value"],
                color=look[label]["color"],
                alpha=shade,
                linestyle=LINES[i % 4],
                label=name,
            )
            place.set_ylabel(found["metric"], fontsize=9)
        place.set_title(label, loc="left", fontsize=11)
        place.tick_params(labelsize=8)
        if any(run["swept"] for run in drawn):
            place.legend(fontsize=7.5)
    for place in axes[-1]:
        place.set_xlabel("step", fontsize=9)
    figure.tight_layout()
    return figure


def calibration(results: Found) -> Figure | None:
    """Reliability of the implicit rewards on held-out pairs: of each objective the run with the
    smallest error.
    """
    best: dict[str, Found] = {}
    for run in results["runs"]:
        found = run.get("calibration")
        if found and (run["label"] not in best or found["error"] < best[run["label"]]["error"]):
            best[run["label"]] = found
    if not best:
        return None
    look = styles(results)
    figure, axes = plt.subplots(figsize=(6, 5))
    axes.plot(
        [0.5, 1], [0.5, 1], color="black", alpha=0.5, linewidth=2, label="perfectly calibrated"
    )
    for label, found in best.items():
        total = sum(found["counts"])
        kept = [i for i, count in enumerate(found["counts"]) if count >= 0.01 * total]
        confidence, accuracy = (
            [found[name][i] for i in kept] for name in ("confidences", "accuracies")
        )
        axes.plot(
            confidence,
            accuracy,
            label=f"{label} (error {found['error']:.3f})",
            markersize=7,
            **look[label],
        )
    axes.set(
        xlabel="confidence of the implicit reward",
        ylabel="share of held-out pairs it gets right",
        xlim=(0.49, 1.01),
    )
    axes.legend(fontsize=9, loc="upper left")
    figure.tight_layout()
    return figure


def pass_at_k(results: Found) -> Figure | None:
    """Share of prompts answered by at least one of k samples (solid), and by their majority
    (dotted).
    """
    rows = results["pass_at_k"]
    if not rows:
        return None
    look = {**styles(results), "base": {"color": "black", "marker": "s", "linestyle": "-"}}
    labels = {run["name"]: run["label"] for run in results["runs"]} | {"base": "base"}
    best: dict[str, Found] = {}
    for row in rows:
        label = labels[row["name"]]
        if label not in best or row["pass"][0] > best[label]["pass"][0]:
            best[label] = row
    figure, axes = plt.subplots(figsize=(7, 5))
    for label, row in best.items():
        axes.plot(row["k"], row["pass"], label=label, markersize=6, **look[label])
        axes.plot(
            row["k"], row["majority"], color=look[label]["color"], linestyle=":", linewidth=1.4
        )
    axes.set_xscale("log", base=2)
    ticks = rows[0]["k"]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.set(xlabel="k samples", ylabel="share of prompts", ylim=(None, 1.01))
    axes.legend(fontsize=9, title="pass@k (dotted: majority@k)", title_fontsize=9)
    figure.tight_layout()
    return figure


def samples(results: Found) -> Figure | None:
    """A few prompts with the base model's completion and that of the objective that gained most,
    side by side.
    """
    shown = results["samples_shown"]
    areas = results["verdicts"]["areas"]
    if not shown["runs"]:
        return None
    label = (
        max(areas, key=lambda row: row["area"]["value"])["label"]
        if areas
        else next(iter(shown["runs"]))
    )
    rows = [(row["prompt"], row["before"], row["after"][label]) for row in shown["rows"][:5]]
    cells = [
        [_plain(prompt), *(f"{s['text'].strip()}  ({_score(s['score'])})" for s in sides)]
        for prompt, *sides in rows
    ]
    wrapped = [["prompt", "before (score)", f"after: {shown['runs'][label]} (score)"]]
    wrapped += [[textwrap.fill(textwrap.shorten(cell, 330), 44) for cell in row] for row in cells]
    heights = [max(cell.count("\n") + 1 for cell in row) + 0.8 for row in wrapped]
    figure = plt.figure(figsize=(11.5, 0.2 * sum(heights) + 0.2))
    top = 1.0
    total = sum(heights)
    for i, (row, height) in enumerate(zip(wrapped, heights)):
        for x, cell in zip((0.0, 0.34, 0.68), row):
            weight = "bold" if i == 0 else "normal"
            figure.text(
                x,
                top - 0.25 / total,
                _literal(cell),
                va="top",
                fontsize=9.5,
                weight=weight,
                linespacing=1.25,
            )
        top -= height / total
        figure.add_artist(
            plt.Line2D(
                (0, 1), (top, top), color="#bbb", linewidth=0.8, transform=figure.transFigure
            )
        )
    return figure


def _literal(text: str) -> str:
    """matplotlib reads $...$ as mathematics."""
    return text.replace("$", r"\$")


def _plain(prompt: Any) -> str:
    """A prompt as one text; of a chat the last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _score(value: float | None) -> str:
    return f"{value:+.2f}" if _known(value) else "no score"


def _rows(results: Found, run: Found) -> Sequence[int]:
    return results["training"][run["name"]]["step"]


def _known(value: float | None) -> bool:
    return value is not None and bool(np.isfinite(value))
