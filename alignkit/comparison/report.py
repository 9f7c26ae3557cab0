"""The report of a comparison: report.md, report.html and the pictures, all from what results.json
holds.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.comparison.blocks import Block, Heading, Items, Picture, Table, Text, html, markdown
from alignkit.comparison.plots import draw

Found = Mapping[str, Any]
MISSING = "-"
EFFICIENT = 0.9
EXACT = (
    "Score and KL of the frontier are exact sums over all outcomes instead; everything that the task's grammar cannot write is "
    "one outcome, so where a model leaves the grammar the sampled KL is larger. "
)
CAPTIONS = {
    "frontier": "Score against KL to the base model. A curve joins one objective's runs, from the base model on; bands are 95 % "
    "intervals from a bootstrap over prompts{seeds}.{best}",
    "training": "One panel per objective, one line per run, means over a hundredth of the run.",
    "calibration": "How sure an objective's implicit reward is of held-out pairs, and how often it is right; of each objective "
    "the run with the smallest expected calibration error. Bins with less than 1 % of the pairs are not drawn.",
    "pass_at_k": "Prompts with at least one right answer among k (solid), and with a right majority (dotted); of each objective "
    "the run with the highest pass@1.",
    "samples": "The first sample of a few prompts, before and after, with the same sampling noise.",
}


def write_report(results: Found, out: Path) -> None:
    """Write the pictures, report.md and report.html into `out`."""
    files = draw(results, out)
    title = f"{len(results['curves'])} objectives on {results['data'].rpartition('/')[2]}"
    blocks = _blocks(results, files)
    (out / "report.md").write_text(markdown(title, blocks))
    (out / "report.html").write_text(html(title, blocks, out))


def _blocks(results: Found, files: Mapping[str, str]) -> list[Block]:
    parts = [
        _summary(results),
        _picture(results, files, "frontier"),
        [_curve_table(results)],
        _verdict_part(results),
        _baseline_part(results),
        _run_part(results),
        _picture(results, files, "training", "Training"),
        _calibration_part(results, files),
        _pass_part(results, files),
        _sample_part(results, files),
        _method(results),
    ]
    return [block for part in parts for block in part]


def _summary(results: Found) -> list[Block]:
    areas = results["verdicts"]["areas"]
    pairs = results["verdicts"]["pairs"]
    runs = results["runs"]
    lines = []
    if areas:
        best = max(areas, key=lambda row: row["area"]["value"])
        reach = f"up to {results['verdicts']['kl']:.2g} nats, the KL that all curves reach"
        lines.append(
            f"Highest mean gain over the base model {reach}: `{best['label']}`, {_with_span(best['area'])}."
        )
    if pairs:
        shown = sum(_decided(pair) for pair in pairs)
        lines.append(
            f"Pairs of objectives at matched KL: {len(pairs)}; a difference is shown for {shown}."
        )
    if results["exact"]:
        able = [
            c["label"]
            for c in results["curves"]
            if any((p["efficiency"] or 0) > EFFICIENT for p in c["points"])
        ]
        names = ", ".join(f"`{label}`" for label in able) or "none"
        lines.append(f"Efficiency above {EFFICIENT} somewhere: {names}.")
    failed = sum(run["status"] == "failed" for run in runs)
    lines.append(f"{len(runs)} runs, {failed or 'none'} failed.")
    how = (
        "exact, all outcomes listed"
        if results["exact"]
        else f"from {results['samples']} samples per prompt"
    )
    what = f"Model `{results['model']}`, data `{results['data']}`, {results['prompts']} evaluation prompts"
    return [Text(f"{what}; score and KL {how}."), Items(lines)]


def _picture(results: Found, files: Mapping[str, str], name: str, heading: str = "") -> list[Block]:
    if name not in files:
        return []
    seeds = (
        " and seeds"
        if len(results["seeds"]) > 1
        else "; one seed, so they say nothing of the luck of a training"
    )
    best = (
        " No policy can be above the thick line, the closed-form optimum."
        if results["exact"]
        else ""
    )
    caption = CAPTIONS[name].replace("{seeds}", seeds).replace("{best}", best)
    return [
        *([Heading(heading)] if heading else []),
        Picture(files[name], name.replace("_", " "), caption),
    ]


def _curve_table(results: Found) -> Table:
    exact = results["exact"]
    base = ["base model", "", _number(0.0), _with_span(results["base"]["score"])]
    rows = [
        [
            curve["label"],
            point["setting"],
            _with_span(point["kl"]),
            _with_span(point["score"]),
            _number(point.get("efficiency")),
        ]
        for curve in results["curves"]
        for point in curve["points"]
    ]
    header = ["objective", "setting", "KL", "score", "efficiency"]
    return Table(
        header if exact else header[:-1],
        [[*base, MISSING], *rows] if exact else [base, *(row[:-1] for row in rows)],
    )


def _verdict_part(results: Found) -> list[Block]:
    pairs = results["verdicts"]["pairs"]
    areas = results["verdicts"]["areas"]
    if not pairs:
        return []
    shown = sorted(
        (pair for pair in pairs if _decided(pair)),
        key=lambda pair: -abs(pair["difference"]["value"]),
    )
    alike = [pair["words"] for pair in pairs if not _decided(pair)]
    intro = (
        "Difference of score where both frontiers have the same KL, the largest that both reach; paired by prompt, 95 % for the "
        f"whole family of {len(pairs)} by Holm's correction. Between its points a frontier is a straight line, below what a run "
        "there would reach, so a curve is at a disadvantage far from its points."
    )
    blocks: list[Block] = [
        Heading("Verdicts at matched KL"),
        Text(intro),
        Items([pair["words"] for pair in shown]),
    ]
    if alike and shown:
        folded = f"{len(alike)} pairs without a difference"
        blocks.append(Table(["no difference shown"], [[words] for words in alike], folded))
    elif alike:
        blocks[-1] = Items(alike)
    blocks.append(
        Text(
            f"Mean gain over the base model along the frontier, KL 0 to {results['verdicts']['kl']:.2g}:"
        )
    )
    return [
        *blocks,
        Table(
            ["objective", "mean gain"], [[row["label"], _with_span(row["area"])] for row in areas]
        ),
    ]


def _baseline_part(results: Found) -> list[Block]:
    found = results["baselines"]
    blocks = list[Block]()
    if "words" in found:
        blocks.append(Text(found["words"]))
    if found["best_of_n"]:
        law = (
            "by the exact law"
            if results["exact"]
            else "by the estimator of Beirami et al. 2024 (arXiv:2401.01879)"
        )
        drawn = (
            ""
            if results["exact"]
            else f", from {found['samples']} samples of the base model per prompt"
        )
        text = f"Best of n: sample n completions, keep the one of the highest score{drawn}. Its KL is {law}; the folklore figure "
        blocks.append(Text(text + "log n - (n - 1) / n is an upper bound."))
        rows = [
            [
                str(row["n"]),
                _with_span(row["kl"]),
                _number(row["folklore"]),
                _with_span(row["score"]),
            ]
            for row in found["best_of_n"]
        ]
        blocks.append(Table(["n", "KL", "folklore", "score"], rows))
    if found["tilted"]:
        text = (
            "The tilted optimum base * exp(score / beta) / Z, the best score at its KL, from the base model's samples, weighted. "
            "Where few samples carry the weight (effective samples) both figures are too low."
        )
        rows = [
            [
                _number(row["beta"]),
                _with_span(row["kl"]),
                _with_span(row["score"]),
                f"{row['effective']:.1f} of {found['samples']}",
            ]
            for row in found["tilted"]
        ]
        blocks += [Text(text), Table(["beta", "KL", "score", "effective samples"], rows)]
    return [Heading("What needs no training"), *blocks] if blocks else []


def _run_part(results: Found) -> list[Block]:
    text = (
        f"Estimates from {results['samples']} samples per prompt, with their sampling error on these prompts. Win rates are "
        "against the base model; the second one is what it would be had both sides written equally long."
    )
    failed = [
        f"`{run['name']}` failed: {run['reason']}"
        for run in results["runs"]
        if run["status"] == "failed"
    ]
    wordless = [
        f"`{run['name']}`: {run['wins']['words']}"
        for run in results["runs"]
        if run.get("wins", {}).get("words")
    ]
    said = [Items([*failed, *wordless])] if failed or wordless else []
    return [
        Heading("Runs"),
        *said,
        Text(text),
        _run_table(results),
        Text("How they write:"),
        _text_table(results),
    ]


def _run_table(results: Found) -> Table:
    header = [
        "run",
        "score",
        "KL",
        "forward KL",
        "win rate",
        "equal lengths",
        "invalid",
        "seconds",
        "CPU",
    ]
    rows = []
    for run in results["runs"]:
        row = [
            run["name"],
            run["status"],
            *[MISSING] * 5,
            f"{run['seconds']:.0f}",
            f"{run['cpu_seconds']:.0f}",
        ]
        if "figures" in run:
            figures = run["figures"]
            errors = run["standard_errors"]
            wins = run["wins"]
            row[1:7] = [
                f"{_number(figures['score']['value'])} ± {_number(errors['score'])}",
                f"{_number(figures['kl']['value'])} ± {_number(errors['kl'])}",
                _number(figures["forward_kl"]["value"]),
                _with_span(wins["rate"]),
                _number(wins["length_controlled"]),
                f"{100 * wins['invalid']:.0f} %",
            ]
        rows.append(row)
    return Table(header, rows)


def _text_table(results: Found) -> Table:
    names = {
        "length": "tokens",
        "ended": "ended by itself",
        "kl_per_token": "KL per token",
        "entropy": "entropy, nats",
    }
    names |= {f"distinct_{n}": f"distinct-{n}" for n in (1, 2)}
    models = {"base model": results["base"]} | {
        run["name"]: run["figures"] for run in results["runs"] if "figures" in run
    }
    rows = [
        [name, *(_number(figures[key]["value"]) for key in names)]
        for name, figures in models.items()
    ]
    return Table(["model", *names.values()], rows)


def _calibration_part(results: Found, files: Mapping[str, str]) -> list[Block]:
    runs = [run for run in results["runs"] if "calibration" in run]
    rows = [
        [run["name"], _number(run["calibration"]["accuracy"]), _number(run["calibration"]["error"])]
        for run in runs
    ]
    table = Table(["run", "preference accuracy", "expected calibration error"], rows)
    return (
        [*_picture(results, files, "calibration", "Calibration on held-out pairs"), table]
        if rows
        else []
    )


def _pass_part(results: Found, files: Mapping[str, str]) -> list[Block]:
    rows = results["pass_at_k"]
    if not rows:
        return []
    header = ["model", *(f"{name}@{k}" for name in ("pass", "majority") for k in rows[0]["k"])]
    cells = [
        [row["name"], *(_number(value) for value in (*row["pass"], *row["majority"]))]
        for row in rows
    ]
    return [*_picture(results, files, "pass_at_k", "pass@k"), Table(header, cells)]


def _sample_part(results: Found, files: Mapping[str, str]) -> list[Block]:
    shown = results["samples_shown"]
    if not shown["runs"]:
        return []
    names = ", ".join(f"`{name}`" for name in shown["runs"].values())
    rows = [
        [
            _prompt(row["prompt"]),
            *(_sample(side) for side in (row["before"], *row["after"].values())),
        ]
        for row in shown["rows"]
    ]
    table = Table(["prompt", "before", *shown["runs"]], rows, "The same prompts by every objective")
    text = Text(f"Of each objective the run of the highest score: {names}.")
    return [*_picture(results, files, "samples", "Samples before and after"), text, table]


def _method(results: Found) -> list[Block]:
    text = (
        "Every model answered the same prompts with the same sampling noise, at temperature 1 over the whole vocabulary. KL is "
        "KL(model || base) in nats per completion: the exact KL of each token's distribution, summed along the sample "
        "(Rao-Blackwellised). "
    )
    text += EXACT if results["exact"] else ""
    text += (
        "Between two points the frontier is straight: choosing one of the two models at random is at least as good. Efficiency "
        "is the gain over the base model divided by the best possible gain at the same KL, from 0.1 nat on."
    )
    minutes = sum(run["cpu_seconds"] for run in results["runs"]) / 60
    known = all(run["cpu_seconds"] for run in results["runs"])
    seeds = ", ".join(map(str, results["seeds"]))
    spent = f"; training took {minutes:.1f} minutes of CPU" if known else ""
    command = f"`alignkit compare {results['recipe']}`, seeds {seeds}{spent}."
    return [Heading("How it was measured"), Text(text), Text(command)]


def _decided(pair: Found) -> bool:
    """Whether the difference's interval leaves out 0."""
    low = pair["difference"]["low"]
    high = pair["difference"]["high"]
    return low is not None and high is not None and (low > 0 or high < 0)


def _prompt(prompt: Any) -> str:
    return (
        prompt
        if isinstance(prompt, str)
        else " / ".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    )


def _sample(side: Found) -> str:
    score = "no score" if side["score"] is None else f"{side['score']:+.2f}"
    return f"{side['text'].strip()} ({score})"


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _with_span(found: Found) -> str:
    span = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
    return _number(found["value"]) + span
