"""The pictures of a comparison, from the content of results.json. Colour, marker and line style
each tell the curves apart.
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

from alignkit.evaluation.drawing import COLOURS, KL_AXIS, LINES, MARKERS, STYLE, save_picture

Row = Mapping[str, Any]  # one JSON object


def draw(results: Row, out: Path) -> dict[str, str]:
    """Write every picture that the results have something for into the folder `out`.

    Returns picture name -> file name.
    """
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
            if figure is None:
                continue
            file = out / f"{name}.png"
            save_picture(figure, file)
            files[name] = file.name
    return files


def styles(results: Row) -> dict[str, dict[str, Any]]:
    """Label -> how its curve looks, the same in every picture."""
    curves = results.get("decoder_curves", [])  # results of earlier versions have none
    labels = dict.fromkeys([run["label"] for run in results["runs"]])
    labels |= dict.fromkeys(curve["label"] for curve in curves)
    return {
        label: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": LINES[i % len(LINES)],
        }
        for i, label in enumerate(labels)
    }


def frontier(results: Row) -> Figure | None:
    """Score against KL: curves with bands, baselines, and where it is known the best that any
    policy can do, with the efficiency in a second panel.
    """
    curves = results["curves"]
    if not curves:
        return None
    two_panels = bool(results["baselines"]["optimal"])
    columns = 2 if two_panels else 1
    size = (11.5, 5.2) if two_panels else (8, 5.4)
    figure, axes = plt.subplots(1, columns, figsize=size, squeeze=False)
    main = axes[0, 0]
    look = styles(results)

    drawn = [*curves, *results.get("decoder_curves", [])]
    reach = 1.08 * max(point["kl"]["value"] for curve in drawn for point in curve["points"])
    _draw_baselines(main, results, reach)
    for curve in curves:
        _draw_curve(main, curve, look[curve["label"]])
    for curve in results.get("decoder_curves", []):
        _draw_decoder(main, curve, results["decoders"], look[curve["label"]])
    main.set_title("what is gained at which distance", loc="left", fontsize=11)
    main.set(
        xlabel=KL_AXIS,
        ylabel="expected score" if results["exact"] else "mean score",
        xlim=(-0.02 * reach, reach),
    )
    if two_panels:
        _draw_efficiency(axes[0, 1], results, look, reach)

    # One legend below both panels.
    handles, labels = main.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=4 if two_panels else 3,
        fontsize=10,
    )
    figure.tight_layout()
    return figure


def _draw_curve(axes: Axes, curve: Row, look: Mapping[str, Any]) -> None:
    """One objective's runs and the line through them with its band; from the base model to the
    first run, where no verdict is given, the line is thin.
    """
    band = curve["band"]
    at = np.array(band["at"])
    line = np.array(band["score"])
    # An end that no replicate knows is None in JSON.
    low, high = (np.array(band[end], dtype=float) for end in ("low", "high"))
    axes.fill_between(at, low, high, color=look["color"], alpha=0.13, linewidth=0)

    kl = np.array([point["kl"]["value"] for point in curve["points"]])
    score = np.array([point["score"]["value"] for point in curve["points"]])
    before = at < kl[0]
    approach = (np.append(at[before], kl[0]), np.append(line[before], score[0]))
    axes.plot(*approach, color=look["color"], linewidth=0.8, linestyle=":")

    # The line bends between the runs, and only the runs have markers.
    x = np.concatenate([kl, at[~before]])
    order = np.argsort(x, kind="stable")
    y = np.concatenate([score, line[~before]])[order]
    runs = [int(place) for place in np.flatnonzero(order < len(kl))]
    axes.plot(
        x[order], y, label=curve["label"], linewidth=1.8, markersize=7, markevery=runs, **look
    )


def _draw_decoder(axes: Axes, curve: Row, decoders: Sequence[Row], look: Mapping[str, Any]) -> None:
    """The decoders of one label, joined by a thin line, with the dearest one's price in the legend; a
    bar that lies is a KL of which an interval is known.
    """
    own = [row for row in decoders if row["label"] == curve["label"]]
    kl = [point["kl"]["value"] for point in curve["points"]]
    score = [point["score"]["value"] for point in curve["points"]]
    dearest = max(own, key=lambda row: row["sampled"])
    price = f"up to {dearest['sampled']:.0f} tokens, {dearest['reward_calls']:.0f} reward calls"
    hollow = {**look, "linewidth": 0.9, "markerfacecolor": "white", "markersize": 7}
    axes.plot(kl, score, label=f"{curve['label']} ({price})", **hollow)

    by_setting = {row["setting"]: row for row in own}
    for point in curve["points"]:
        low = by_setting[point["setting"]]["kl_low"]
        if low is not None:
            ends = [low, point["kl"]["value"]]
            height = [point["score"]["value"]] * 2
            axes.plot(ends, height, color=look["color"], linewidth=5, alpha=0.35)


def _draw_baselines(axes: Axes, results: Row, reach: float) -> None:
    """The best possible line or its estimate, best of n, and the base model, up to KL `reach`."""
    baselines = results["baselines"]
    if baselines["optimal"]:
        kl = np.array(baselines["optimal"]["kl"])
        score = np.array(baselines["optimal"]["score"])
        seen = kl <= reach * 1.05
        optimal: dict[str, Any] = {"color": "black", "linewidth": 2.6, "alpha": 0.55}
        axes.plot(kl[seen], score[seen], label="best possible", **optimal)

    tilted = [row for row in baselines["tilted"] if row["kl"]["value"] <= reach]
    if tilted:
        axes.plot(
            [row["kl"]["value"] for row in tilted],
            [row["score"]["value"] for row in tilted],
            label="tilted optimum, estimated",
            color="black",
            linewidth=1.6,
            linestyle=(0, (5, 2)),
            alpha=0.6,
        )

    best_of_n = [row for row in baselines["best_of_n"] if row["kl"]["value"] <= reach]
    if best_of_n:
        kls = [row["kl"]["value"] for row in best_of_n]
        scores = [row["score"]["value"] for row in best_of_n]
        ring: dict[str, Any] = {"color": "black", "markerfacecolor": "white", "markersize": 8}
        axes.plot(kls, scores, "o", label="best of n samples, no training", **ring)
        for row, x, y in zip(best_of_n, kls, scores):
            label = f"n={row['n']}"
            axes.annotate(label, (x, y), textcoords="offset points", xytext=(7, -12), fontsize=9)

    base_score = results["base"]["score"]["value"]
    axes.plot(0, base_score, "s", color="black", markersize=7, label="base model")


def _draw_efficiency(axes: Axes, results: Row, look: Mapping[str, Any], reach: float) -> None:
    """Share of the best possible gain at the same KL."""
    known: list[float] = []
    for curve in results["curves"]:
        points = [point for point in curve["points"] if _known(point["efficiency"])]
        if points:
            shares = [point["efficiency"] for point in points]
            known += shares
            kl = [point["kl"]["value"] for point in points]
            axes.plot(kl, shares, linewidth=1.8, markersize=7, **look[curve["label"]])
    axes.axhline(1.0, color="black", linewidth=2.6, alpha=0.55)

    # Efficiencies are close to 1, so the axis leaves out what lies far below the lowest.
    lowest = min(known, default=0.0)
    bottom = max(0.0, 1 - 1.5 * (1 - lowest))
    top = 1 + 0.1 * (1 - max(lowest, 0.0))
    axes.set(xlabel=KL_AXIS, xlim=(-0.02 * reach, reach), ylim=(bottom, top))
    title = "efficiency: share of the best possible gain at the same KL"
    axes.set_title(title, loc="left", fontsize=11)


def training(results: Row) -> Figure | None:
    """One panel per objective, one line per run."""
    look = styles(results)
    logged = [run for run in results["runs"] if results["training"][run["name"]]["step"]]
    labels = list(dict.fromkeys(run["label"] for run in logged))
    if not labels:
        return None
    columns = min(4, len(labels))
    rows = -(-len(labels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.95 * columns, 2.5 * rows), squeeze=False)
    for panel in axes.flat[len(labels) :]:
        panel.set_visible(False)

    for panel, label in zip(axes.flat, labels):
        runs = [run for run in logged if run["label"] == label]
        for i, run in enumerate(runs):
            curve = results["training"][run["name"]]
            # Later runs are drawn darker, so that one colour tells them apart.
            panel.plot(
                curve["step"],
                curve["value"],
                color=look[label]["color"],
                alpha=0.45 + 0.55 * (i + 1) / len(runs),
                linestyle=LINES[i % len(LINES)],
                label=", ".join(f"{field} {value}" for field, value in run["swept"].items()),
            )
            panel.set_ylabel(curve["metric"], fontsize=9)
        panel.set_title(label, loc="left", fontsize=11)
        panel.tick_params(labelsize=8)
        if any(run["swept"] for run in runs):
            panel.legend(fontsize=7.5)

    for panel in axes[-1]:
        panel.set_xlabel("step", fontsize=9)
    figure.tight_layout()
    return figure


def calibration(results: Row) -> Figure | None:
    """Reliability of the implicit rewards on held-out pairs: of
    each objective the run with the smallest error.
    """
    best: dict[str, Row] = {}
    for run in results["runs"]:
        fit = run.get("calibration")
        if fit and (run["label"] not in best or fit["error"] < best[run["label"]]["error"]):
            best[run["label"]] = fit
    if not best:
        return None

    look = styles(results)
    figure, axes = plt.subplots(figsize=(6, 5))
    diagonal: dict[str, Any] = {"color": "black", "alpha": 0.5, "linewidth": 2}
    axes.plot([0.5, 1], [0.5, 1], label="perfectly calibrated", **diagonal)
    for label, fit in best.items():
        # Bins with few pairs would jump about.
        enough = 0.01 * sum(fit["counts"])
        bins = [i for i, count in enumerate(fit["counts"]) if count >= enough]
        confidence = [fit["confidences"][i] for i in bins]
        accuracy = [fit["accuracies"][i] for i in bins]
        name = f"{label} (error {fit['error']:.3f})"
        axes.plot(confidence, accuracy, label=name, markersize=7, **look[label])

    axes.set(
        xlabel="confidence of the implicit reward",
        ylabel="share of held-out pairs it gets right",
        xlim=(0.49, 1.01),
    )
    axes.legend(fontsize=9, loc="upper left")
    figure.tight_layout()
    return figure


def pass_at_k(results: Row) -> Figure | None:
    """Share of prompts answered by at least one of k samples (solid), and by their majority
    (dotted); of each objective the run with the highest pass@1.
    """
    rows = results["pass_at_k"]
    if not rows:
        return None
    look = {**styles(results), "base": {"color": "black", "marker": "s", "linestyle": "-"}}
    labels = {run["name"]: run["label"] for run in results["runs"]} | {"base": "base"}
    best: dict[str, Row] = {}
    for row in rows:
        label = labels[row["name"]]
        if label not in best or row["pass"][0] > best[label]["pass"][0]:
            best[label] = row

    figure, axes = plt.subplots(figsize=(7, 5))
    for label, row in best.items():
        axes.plot(row["k"], row["pass"], label=label, markersize=6, **look[label])
        colour = look[label]["color"]
        axes.plot(row["k"], row["majority"], color=colour, linestyle=":", linewidth=1.4)

    axes.set_xscale("log", base=2)
    ticks = rows[0]["k"]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.set(xlabel="k samples", ylabel="share of prompts", ylim=(None, 1.01))
    axes.legend(fontsize=9, title="pass@k (dotted: majority@k)", title_fontsize=9)
    figure.tight_layout()
    return figure


def samples(results: Row) -> Figure | None:
    """A few prompts with the base model's completion and that of the objective that gained most,
    side by side.
    """
    shown = results["samples_shown"]
    if not shown["runs"]:
        return None
    areas = results["verdicts"]["areas"]
    label = next(iter(shown["runs"]))
    if areas:
        label = max(areas, key=lambda row: row["area"]["value"])["label"]

    # The cells of a table with three columns, wrapped to lines.
    table = [["prompt", "before (score)", f"after: {shown['runs'][label]} (score)"]]
    for row in shown["rows"][:5]:
        sides = [
            f"{side['text'].strip()}  ({_score(side['score'])})"
            for side in (row["before"], row["after"][label])
        ]
        cells = [_last_message(row["prompt"]), *sides]
        table.append([textwrap.fill(textwrap.shorten(cell, 330), 44) for cell in cells])
    heights = [max(cell.count("\n") + 1 for cell in row) + 0.8 for row in table]  # in lines
    total = sum(heights)

    # Text is placed by hand, from the top (1) down, with a line under every row.
    figure = plt.figure(figsize=(11.5, 0.2 * total + 0.2))
    top = 1.0
    for i, (row, height) in enumerate(zip(table, heights)):
        for x, cell in zip((0.0, 0.34, 0.68), row):
            figure.text(
                x,
                top - 0.25 / total,
                cell,
                va="top",
                fontsize=9.5,
                weight="bold" if i == 0 else "normal",
                linespacing=1.25,
            )
        top -= height / total
        ends = ((0, 1), (top, top))
        rule = plt.Line2D(*ends, color="#bbb", linewidth=0.8, transform=figure.transFigure)
        figure.add_artist(rule)
    return figure


def _last_message(prompt: Any) -> str:
    """A prompt as one text; of a chat the last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _score(value: float | None) -> str:
    return f"{value:+.2f}" if _known(value) else "no score"


def _known(value: float | None) -> bool:
    return value is not None and bool(np.isfinite(value))
