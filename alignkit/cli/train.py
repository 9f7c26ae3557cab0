"""`alignkit train`: one run by a recipe. What it does is in `alignkit.runs.launch`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli.options import AllowPrivateJudge, Overrides, RecipeName, Safe


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|PATH", help="Continue from the newest checkpoint, or from this one."
        ),
    ] = None,
    safe: Safe = False,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes on this machine, such as one per GPU.")
    ] = 1,
    allow_private_judge: AllowPrivateJudge = False,
) -> None:
    """Train a model by a recipe."""
    from alignkit.config.recipe import load_recipe
    from alignkit.runs.launch import check_without_torch, resolve_task, run_recipe

    loaded = load_recipe(recipe, overrides or [])
    check_without_torch(loaded, safe)

    if processes > 1:
        from alignkit.distributed.launcher import launch

        resolve_task(loaded)  # once, before there are several processes
        arguments = ["train", recipe, *(overrides or [])]
        if resume:
            arguments += ["--resume", resume]
        if safe:
            arguments.append("--safe")
        raise typer.Exit(launch(processes, arguments))

    result = run_recipe(loaded, resume, safe=safe)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"{result.step} steps done; the model is in {Path(loaded.output_dir) / 'model'}")
