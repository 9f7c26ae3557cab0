"""`alignkit eval`: its options. What it does is in `alignkit.evaluation.evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli.options import AllowPrivateJudge, Safe
from alignkit.errors import ConfigError


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="RUN_OR_MODEL...", help="Run folders, models, or task:NAME."),
    ],
    reference: Annotated[
        str | None,
        typer.Option(help="What KL is measured from; default: what the runs started from."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="File, or task:NAME; default: the run's data.eval, else its task's."),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME",
            help="Score of a completion; default: the run's rewards, else its task's.",
        ),
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(help="Held-out pairs: accuracy and calibration of the preferences."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Held-out text (rows with `text`): perplexity.")
    ] = None,
    unrelated: Annotated[
        str | None, typer.Option(help="Prompts of another kind: KL there is forgetting.")
    ] = None,
    correct: Annotated[
        float | None,
        typer.Option(help="A completion with this score is right: adds pass@k and majority@k."),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(min=2, help="Completions per prompt, with the same noise for every model."),
    ] = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Cap on their tokens; default: the run's.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling noise.")] = 0,
    to: Annotated[Path, typer.Option(help="File for the results.")] = Path("eval.json"),
    safe: Safe = False,
    allow_private_judge: AllowPrivateJudge = False,
) -> None:
    """Measure finished models: score, KL to where they started, win rate and more, as a table and
    as JSON.
    """
    if to.exists():
        raise ConfigError(f"{to} exists already; name another file with --to")
    from alignkit.evaluation.evaluate import Request, evaluate_to_file

    asked = Request(
        models=models,
        reference=reference,
        prompts=prompts,
        reward=reward,
        pairs=pairs,
        text=text,
        unrelated=unrelated,
        correct=correct,
        samples=samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
        safe=safe,
    )
    evaluate_to_file(asked, to)
    typer.echo(f"the figures are in {to}")
