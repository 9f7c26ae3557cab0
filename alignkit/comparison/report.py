"""The report of a comparison: report.md, report.html and the
pictures, all from the content of results.json.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.comparison.decoder_table import decoder_blocks
from alignkit.comparison.matched_blocks import matched_blocks
from alignkit.comparison.plots import draw
from alignkit.comparison.verdicts import is_decided, verdict_items
from alignkit.evaluation.blocks import Block, Heading, Items, Picture, Table, Text, html, markdown
from alignkit.evaluation.page import MISSING, number, span
from alignkit.files import write_text

Row = Mapping[str, Any]  # one JSON object
EFFICIENT = 0.9  # the efficiency from which on the summary names an objective
EXACT = (
    "Score and KL of the frontier are exact sums over all outcomes instead; everything that the "
    "task's grammar cannot write is one outcome, so where a model leaves the grammar the sampled "
    "KL is larger. "
)
CAPTIONS = {
    "frontier": "Score against KL to the base model. A curve joins one objective's runs; dotted, "
    "from the base model to the first of them. Bands are 95 % intervals from a bootstrap over "
    "prompts{seeds}.{best}",
    "training": "One panel per objective, one line per run, means over a hundredth of the run.",
    "calibration": "How sure an objective's implicit reward is of held-out pairs, and how often it "
    "is right; of each objective the run with the smallest expected calibration error. Bins with "
    "less than 1 % of the pairs are not drawn.",
    "pass_at_k": "Prompts with at least one right answer among k (solid), and with a right "
    "majority (dotted); of each objective the run with the highest pass@1.",
    "samples": "The first sample of a few prompts, before and after, with the same sampling noise.",
}


def write_report(results: Row, out: Path) -> None:
    """Write the pictures, report.md and report.html into the folder `out`."""
    files = draw(results, out)
    data = ", ".join(name.rpartition("/")[2] for name in results["data"].split(", "))
    title = f"{len(results['curves'])} objectives on {data}"
    blocks = _blocks(results, files)
    write_text(out / "report.md", markdown(title, blocks))
    write_text(out / "report.html", html(title, blocks, out))


def _blocks(results: Row, files: Mapping[str, str]) -> list[Block]:
    """The report from top to bottom; `files` names the pictures that were drawn."""
    return [
        *_summary(results),
        *_picture(results, files, "frontier"),
        _curve_table(results),
        *matched_blocks(results),
        *_verdict_part(results),
        *_baseline_part(results),
        *_run_part(results),
        *_picture(results, files, "training", "Training"),
        *_calibration_part(results, files),
        *_pass_part(results, files),
        *_sample_part(results, files),
        *_method(results),
    ]


def _summary(results: Row) -> list[Block]:
    """What was compared, and the result in a few sentences."""
    verdicts = results["verdicts"]
    areas = verdicts["areas"]
    pairs = verdicts["pairs"]
    runs = results["runs"]
    sentences = []
    if len(areas) > 1:
        best = max(areas, key=lambda row: row["area"]["value"])
        where = f"{_range(verdicts)}, which the runs of all objectives span"
        sentences.append(
            f"Highest mean gain over the base model {where}: "
            f"`{best['label']}`, {span(best['area'])}."
        )
    if verdicts["words"]:
        sentences.append(_sentence(verdicts["words"]))
    if pairs:
        compared = sum(pair["difference"] is not None for pair in pairs)
        shown = sum(is_decided(pair) for pair in pairs)
        sentences.append(
            f"Pairs of objectives: {len(pairs)}; comparable at matched KL: {compared}; "
            f"a difference is shown for {shown}."
        )
    if results["exact"]:
        efficient = [
            f"`{curve['label']}`"
            for curve in results["curves"]
            if any((point["efficiency"] or 0) > EFFICIENT for point in curve["points"])
        ]
        names = ", ".join(efficient) or "none"
        sentences.append(f"Efficiency above {EFFICIENT} somewhere: {names}.")
    failed = sum(run["status"] == "failed" for run in runs)
    stale = sum(run["status"] == "stale" for run in runs)
    left_out = f", {stale} stale and left out" if stale else ""
    sentences.append(f"{len(runs)} runs, {failed or 'none'} failed{left_out}.")

    sampled = f"from {results['samples']} samples per prompt"
    how = "exact, all outcomes listed" if results["exact"] else sampled
    what = (
        f"Model `{results['model']}`, data `{results['data']}`, "
        f"{results['prompts']} evaluation prompts"
    )
    return [Text(f"{what}; score and KL {how}."), Items(sentences)]


def _picture(results: Row, files: Mapping[str, str], name: str, heading: str = "") -> list[Block]:
    """A picture with its caption, under `heading` if one is given; nothing if it was not drawn."""
    if name not in files:
        return []
    seeds = "; one seed, so they say nothing of the luck of a training"
    if len(results["seeds"]) > 1:
        seeds = " and seeds"
    best = ""
    if results["exact"]:
        best = " No policy can be above the thick line, the closed-form optimum."

    caption = CAPTIONS[name].replace("{seeds}", seeds).replace("{best}", best)
    picture = Picture(files[name], name.replace("_", " "), caption)
    return [Heading(heading), picture] if heading else [picture]


def _curve_table(results: Row) -> Table:
    """Every point of every curve; the efficiency only where the optimum is known."""
    header = ["objective", "setting", "KL", "score", "efficiency"]
    base_score = span(results["base"]["score"])
    rows = [["base model", "", number(0.0), base_score, MISSING]]
    for curve in results["curves"]:
        for point in curve["points"]:
            row = [curve["label"], point["setting"]]
            row += [span(point["kl"]), span(point["score"])]
            rows.append([*row, number(point.get("efficiency"))])

    if results["exact"]:
        return Table(header, rows)
    return Table(header[:-1], [row[:-1] for row in rows])


def _verdict_part(results: Row) -> list[Block]:
    """Pairs of objectives at matched KL, the large differences first, and the mean gains."""
    verdicts = results["verdicts"]
    pairs = verdicts["pairs"]
    if not pairs:
        return []
    compared = [pair for pair in pairs if pair["difference"] is not None]
    line = "efficiency" if results["exact"] else "gain in sqrt(KL) (Gao et al. 2022)"
    blocks: list[Block] = [
        Heading("Verdicts at matched KL"),
        Text(
            "Difference of score where both frontiers have the same KL, the largest that both "
            f"reach; paired by prompt, 95 % for the whole family of {len(compared)} by Holm's "
            f"correction. Between two runs the {line} is interpolated. There is no verdict "
            "outside the KLs that the runs of both objectives span."
        ),
    ]
    blocks += verdict_items(pairs)

    if verdicts["areas"]:
        text = f"Mean gain over the base model along the frontier, {_range(verdicts)}:"
        gains = [[row["label"], span(row["area"])] for row in verdicts["areas"]]
        blocks += [Text(text), Table(["objective", "mean gain"], gains)]
    elif verdicts["words"]:
        blocks.append(Text(_sentence(verdicts["words"])))
    return blocks


def _baseline_part(results: Row) -> list[Block]:
    """What needs no training: best of n, and the tilted optimum where it had to be estimated."""
    baselines = results["baselines"]
    blocks: list[Block] = []
    if "words" in baselines:
        blocks.append(Text(baselines["words"]))

    if baselines["best_of_n"]:
        if results["exact"]:
            law = "by the exact law"
            source = ""
        else:
            law = "by the estimator of Beirami et al. 2024 (arXiv:2401.01879)"
            source = f", from {baselines['samples']} samples of the base model per prompt"
        text = (
            f"Best of n: sample n completions, keep the one of the highest score{source}. "
            f"Its KL is {law}; the folklore figure log n - (n - 1) / n is an upper bound."
        )
        rows = [
            [
                str(row["n"]),
                span(row["kl"]),
                number(row["folklore"]),
                span(row["score"]),
            ]
            for row in baselines["best_of_n"]
        ]
        blocks += [Text(text), Table(["n", "KL", "folklore", "score"], rows)]

    if baselines["tilted"]:
        text = (
            "The tilted optimum base * exp(score / beta) / Z, the best score at its KL, from the "
            "base model's samples, weighted. Where few samples carry the weight (effective "
            "samples) both figures are too low."
        )
        rows = []
        for row in baselines["tilted"]:
            effective = f"{row['effective']:.1f} of {baselines['samples']}"
            cells = [number(row["beta"]), span(row["kl"]), span(row["score"])]
            rows.append([*cells, effective])
        blocks += [Text(text), Table(["beta", "KL", "score", "effective samples"], rows)]
    blocks += decoder_blocks(results)
    return [Heading("What needs no training"), *blocks] if blocks else []


def _run_part(results: Row) -> list[Block]:
    """What went wrong, and the tables of all runs."""
    text = (
        f"Estimates from {results['samples']} samples per prompt, with their sampling error on "
        "these prompts. Win rates are against the base model; the second one is what it would be "
        "had both sides written equally long."
    )
    runs = results["runs"]
    problems = [
        f"`{run['name']}` failed: {run['reason']}" for run in runs if run["status"] == "failed"
    ]
    problems += [
        f"`{run['name']}` is stale and left out: {run['reason']}"
        for run in runs
        if run["status"] == "stale"
    ]
    problems += [
        f"`{run['name']}`: {run['wins']['words']}"
        for run in runs
        if run.get("wins", {}).get("words")
    ]

    blocks: list[Block] = [Heading("Runs")]
    if problems:
        blocks.append(Items(problems))
    blocks += [Text(text), _run_table(results), Text("How they write:"), _text_table(results)]
    return blocks


def _run_table(results: Row) -> Table:
    header = ["run", "score", "KL", "forward KL", "win rate", "equal lengths", "invalid"]
    header += ["seconds", "CPU"]
    rows = []
    for run in results["runs"]:
        if "figures" in run:
            means = run["figures"]
            errors = run["standard_errors"]
            wins = run["wins"]
            measured = [
                f"{number(means['score']['value'])} ± {number(errors['score'])}",
                f"{number(means['kl']['value'])} ± {number(errors['kl'])}",
                number(means.get("forward_kl", {}).get("value")),  # episodes have none
                span(wins["rate"]),
                number(wins["length_controlled"]),
                f"{100 * wins['invalid']:.0f} %",
            ]
        else:
            # Not measured: the state of the run stands in the place of its score.
            measured = [run["status"], *[MISSING] * 5]
        spent = [f"{run['seconds']:.0f}", f"{run['cpu_seconds']:.0f}"]
        rows.append([run["name"], *measured, *spent])
    return Table(header, rows)


def _text_table(results: Row) -> Table:
    """Length, entropy and variety of what the base model and the runs write."""
    columns = {
        "length": "tokens",
        "ended": "ended by itself",
        "kl_per_token": "KL per token",
        "entropy": "entropy, nats",
        "distinct_1": "distinct-1",
        "distinct_2": "distinct-2",
    }

    models = {"base model": results["base"]}
    models |= {run["name"]: run["figures"] for run in results["runs"] if "figures" in run}
    rows = [
        [name, *(number(means[column]["value"]) for column in columns)]
        for name, means in models.items()
    ]
    return Table(["model", *columns.values()], rows)


def _calibration_part(results: Row, files: Mapping[str, str]) -> list[Block]:
    rows = []
    for run in results["runs"]:
        if "calibration" in run:
            fit = run["calibration"]
            rows.append([run["name"], number(fit["accuracy"]), number(fit["error"])])
    if not rows:
        return []
    table = Table(["run", "preference accuracy", "expected calibration error"], rows)
    return [*_picture(results, files, "calibration", "Calibration on held-out pairs"), table]


def _pass_part(results: Row, files: Mapping[str, str]) -> list[Block]:
    rows = results["pass_at_k"]
    if not rows:
        return []
    header = ["model", *(f"{name}@{k}" for name in ("pass", "majority") for k in rows[0]["k"])]
    cells = [
        [row["name"], *(number(value) for value in (*row["pass"], *row["majority"]))]
        for row in rows
    ]
    return [*_picture(results, files, "pass_at_k", "pass@k"), Table(header, cells)]


def _sample_part(results: Row, files: Mapping[str, str]) -> list[Block]:
    """The same prompts answered by the base model and by the best run of each objective."""
    shown = results["samples_shown"]
    if not shown["runs"]:
        return []
    names = ", ".join(f"`{name}`" for name in shown["runs"].values())
    text = Text(f"Of each objective the run of the highest score: {names}.")

    rows = []
    for row in shown["rows"]:
        sides = [row["before"], *row["after"].values()]
        rows.append([_prompt(row["prompt"]), *(_sample(side) for side in sides)])
    table = Table(["prompt", "before", *shown["runs"]], rows, "The same prompts by every objective")
    return [*_picture(results, files, "samples", "Samples before and after"), text, table]


def _method(results: Row) -> list[Block]:
    """How everything was measured, and the command that repeats it."""
    text = (
        "Every model answered the same prompts with the same sampling noise, at temperature 1 over "
        "the whole vocabulary. KL is KL(model || base) in nats per completion: the exact KL of "
        "each token's distribution, summed along the sample (Rao-Blackwellised). "
    )
    if results["exact"]:
        text += EXACT
    text += (
        "Efficiency is the gain over the base model divided by the best possible gain at the same "
        "KL, from 0.1 nat on."
    )

    # A run that was trained before its processor time was recorded has none.
    minutes = sum(run["cpu_seconds"] for run in results["runs"]) / 60
    known = all(run["cpu_seconds"] for run in results["runs"])
    spent = f"; training took {minutes:.1f} minutes of CPU" if known else ""
    seeds = ", ".join(map(str, results["seeds"]))
    command = f"`alignkit compare {results['recipe']}`, seeds {seeds}{spent}."
    return [Heading("How it was measured"), Text(text), Text(command)]


def _range(verdicts: Row) -> str:
    """The KLs over which gains are averaged."""
    return f"from {verdicts['low']:.2g} to {verdicts['kl']:.2g} nats"


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return " / ".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _sample(side: Row) -> str:
    score = "no score" if side["score"] is None else f"{side['score']:+.2f}"
    lines = side["text"].strip().splitlines()  # of an episode: one for each turn
    return f"{' / '.join(lines)} ({score})"
