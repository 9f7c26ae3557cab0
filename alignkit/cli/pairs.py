"""`alignkit pairs`: its options. What it does is in `alignkit.runs.pairs`."""

from pathlib import Path
from typing import Annotated

import typer

from alignkit.errors import ConfigError

METHODS = ("bradley_terry", "best_worst", "rejection")


def pairs(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A run folder, a model folder, a hub name, or task:NAME."
        ),
    ],
    prompts: Annotated[
        str,
        typer.Argument(
            metavar="PROMPTS", help="A file, a data set folder, a hub name, or task:NAME."
        ),
    ],
    to: Annotated[Path, typer.Option(help="The file to write, JSON lines.")],
    reward: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME|MODEL",
            help="A function or a reward model; default: the task's own.",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help=f"How pairs are made: {', '.join(METHODS)}.")
    ] = "bradley_terry",
    samples: Annotated[int, typer.Option(min=2, help="Completions per prompt.")] = 4,
    per_prompt: Annotated[
        int, typer.Option(min=1, help="Pairs per prompt, at most (best_worst: one).")
    ] = 1,
    label_temperature: Annotated[
        float,
        typer.Option(
            min=0,
            help="The first wins with probability sigmoid(difference / this); 0: the higher score.",
        ),
    ] = 1.0,
    beta: Annotated[
        float, typer.Option(help="rejection: samples of model * exp(score / beta).")
    ] = 0.5,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Cap on the tokens of a completion.")
    ] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="Of the sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling noise and the labels.")] = 0,
    safe: Annotated[bool, typer.Option("--safe", help="Refuse to run a reward function.")] = False,
) -> None:
    """Make preference pairs: sample from a model, score, label, write a file to train on."""
    if method not in METHODS:
        raise ConfigError(
            f"pairs: there is no method `{method}`; it is one of {', '.join(METHODS)}"
        )
    from alignkit.runs.pairs import PairRequest, make_pairs

    request = PairRequest(
        model,
        prompts,
        reward,
        method,
        samples,
        per_prompt,
        label_temperature,
        beta,
        max_new_tokens,
        temperature,
        seed,
        safe,
    )  # type: ignore[arg-type]
    for name, count in make_pairs(request, to).items():
        typer.echo(f"{count:8} {name}")
    typer.echo(f"{to}: train with `alignkit train dpo data.train={to}`")
