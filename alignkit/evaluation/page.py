"""The results of `alignkit eval` as one page that needs no network: what is gained at which KL and at
which price, and what the models write.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from alignkit.config.escaping import printable
from alignkit.evaluation.blocks import (
    Block,
    Cell,
    Coloured,
    Heading,
    Items,
    Picture,
    Table,
    Text,
    html,
)
from alignkit.evaluation.frontier_picture import draw_frontier
from alignkit.files import write_text, writing

Row = Mapping[str, Any]  # one JSON object
MISSING = "-"
FOLDED_FROM = 8  # verdicts beyond which the list is folded away
CAPTION = (
    "Score against KL to the reference. Upright bars are 95 % intervals over prompts; a bar that lies "
    "is a KL of which only an interval is known. The price of a completion stands beside the name: "
    "tokens that were computed, texts that the reward scored.{merged}{best}"
)
METHOD = (
    "Every model answered the same prompts with the same sampling noise. KL is in nats per completion: "
    "for models and for decoders whose law is known token by token the exact KL of each token's law, "
    "summed along the samples; for those that choose among samples an interval or an estimator."
)


def write_page(results: Row, file: Path) -> None:
    """Write the page. ResourceError where the disk refuses."""
    settings = results["settings"]
    with TemporaryDirectory() as folder:
        drawn = draw_frontier(results, Path(folder) / "frontier.png")
        blocks = [
            Text(
                f"Reference `{settings['reference']}`, {settings['prompts']} prompts, "
                f"{settings['samples']} completions each, up to {settings['max_new_tokens']} tokens."
            ),
            *([_picture(results)] if drawn else []),
            _model_table(results),
            *_verdicts(results),
            *_samples(results),
            Heading("How it was measured"),
            Text(METHOD),
        ]
        count = len(results["models"])
        title = f"{count} model{'s' if count > 1 else ''} measured"
        page = html(title, blocks, Path(folder), sortable=True)
    with writing(file):
        write_text(file, page)


def _picture(results: Row) -> Picture:
    several = any("merge" in model for model in results["models"])
    merged = " Models of one merge are joined by a line." if several else ""
    if any("round" in model for model in results["models"]):
        merged = " The rounds are joined by a line in their order."
    best = ""
    if results["optimal"]:
        best = " No policy can be above the thick line, the closed-form optimum."
    return Picture("frontier.png", "frontier", CAPTION.format(merged=merged, best=best))


def _model_table(results: Row) -> Table:
    header = ["model", "score", "KL, nats", "tokens", "reward calls", "win rate", "length"]
    listed = results["base"].get("exact") is not None
    if listed:
        header += ["exact score", "exact KL", "efficiency"]
    forgetting = any("kl_unrelated" in model for model in results["models"])
    if forgetting:
        header.append("KL on unrelated prompts")
    rows: list[list[Cell]] = []
    for model in (results["base"], *results["models"]):
        means = model["figures"]
        row: list[Cell] = [
            model["name"],
            span(means.get("score")),
            kl_words(model),
            f"{means['sampled']['value']:.1f}",
            f"{means['reward_calls']['value']:.1f}",
            span(model.get("win_rate")),
            f"{means['length']['value']:.1f}",
        ]
        if listed:
            exact = model.get("exact") or {}
            row += [number(exact.get(name)) for name in ("score", "kl", "efficiency")]
        if forgetting:
            row.append(span(model.get("kl_unrelated")))
        rows.append(row)
    return Table(header, rows)


def kl_words(model: Row) -> str:
    """The KL of a model: a number with its interval over prompts, or the two ends that are known."""
    means = model["figures"]
    if means.get("kl_low") is None:
        return span(means["kl"])
    return f"{number(means['kl_low']['value'])} to {number(means['kl']['value'])}"


def _verdicts(results: Row) -> list[Block]:
    if not results["verdicts"]:
        return []
    text = (
        "Score, paired by prompt, 95 % for the whole family by Holm's correction; at whatever KL."
    )
    verdicts = results["verdicts"]
    if len(verdicts) <= FOLDED_FROM:
        return [Heading("Who scores higher"), Text(text), Items(verdicts)]
    rows = [[verdict] for verdict in verdicts]
    return [Heading("Who scores higher"), Text(text), Table(["pair"], rows, f"{len(rows)} pairs")]


def _samples(results: Row) -> list[Block]:
    """The same prompts answered by every model, side by side."""
    rows = results["samples"]
    names = list(rows[0]["completions"])
    coloured = any("tokens" in each for row in rows for each in row["completions"].values())
    words = "The first completion of a few prompts, with the same sampling noise."
    if coloured:
        words += (
            " A token on orange is likelier under the model than under the reference, on blue less; "
            "beta times that log-ratio is the token's implicit reward (Rafailov et al. 2024, "
            "arXiv:2404.12358). Decoders that choose among samples have none."
        )
    cells: list[Sequence[Cell]] = [
        [_prompt(row["prompt"]), *(_completion(each) for each in row["completions"].values())]
        for row in rows
    ]
    return [Heading("Samples side by side"), Text(words), Table(["prompt", *names], cells)]


def _completion(each: Row) -> Coloured:
    score = "" if each["score"] is None else f" ({each['score']:+.2f})"
    tokens = each.get("tokens") or [(each["text"].strip(), None)]
    pieces = [(printable(text), value) for text, value in tokens]
    return Coloured([*pieces, (score, None)])


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, str):
        return printable(prompt)
    return printable(" / ".join(f"{turn['role']}: {turn['content']}" for turn in prompt))


def number(value: float | None) -> str:
    """Three digits behind the point, or a dash."""
    return MISSING if value is None else f"{value:.3f}"


def span(interval: Row | None) -> str:
    """A number with its interval, if it has one."""
    if interval is None or interval["value"] is None:
        return MISSING
    if interval["low"] is None:
        return number(interval["value"])
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
