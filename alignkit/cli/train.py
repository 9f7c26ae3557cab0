"""`alignkit train`: one run by a recipe. What it does is in `alignkit.runs.launch`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alignkit.cli.lasting_imports import lasting_imports
from alignkit.cli.options import AllowPrivateJudge, Overrides, RecipeName, Safe

if TYPE_CHECKING:
    from alignkit.config.recipe import Recipe
    from alignkit.objectives.base import Objective


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
    machines: Annotated[
        str,
        typer.Option(
            metavar="N|MIN:MAX",
            help="Machines that run this command; with a range, the job goes on when some fail.",
        ),
    ] = "1",
    first: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Where several machines meet: the first of them."),
    ] = None,
    allow_private_judge: AllowPrivateJudge = False,
) -> None:
    """Train a model by a recipe."""
    from alignkit.config.recipe import load_recipe
    from alignkit.distributed.launcher import launch, machines_of
    from alignkit.runs.checks import check_mesh, check_names, check_without_torch
    from alignkit.runs.columns import check_columns
    from alignkit.runs.launch import resolve_task, run_recipe
    from alignkit.runs.resume import check_output

    loaded = load_recipe(recipe, overrides or [])
    check_without_torch(loaded, safe)
    check_names(loaded)

    several = machines_of(machines, first)
    if several:  # processes that start again go on where they were
        resume = resume or "auto"
    check_output(loaded, resume)
    if resume is None:  # else what is said first is that the run was trained on other data
        check_columns(loaded)
    if not several:
        check_mesh(loaded, processes)
    if processes > 1 or several:
        resolve_task(loaded)  # once, before there are several processes
        arguments = ["train", recipe, *(overrides or [])]
        if resume:
            arguments += ["--resume", resume]
        if safe:
            arguments.append("--safe")
        raise typer.Exit(launch(processes, arguments, several))

    result = run_recipe(loaded, resume, safe=safe, objective=_objective(loaded, safe))
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"{result.step} steps done; the model is in {Path(loaded.output_dir) / 'model'}")


def _objective(recipe: "Recipe", safe: bool) -> "Objective":
    """The recipe's objective, and all imports of a run."""
    from alignkit.config.streams import objective_of

    with lasting_imports():
        # Before the rest, which takes longer: what it refuses is said sooner.
        objective = objective_of(recipe, safe=safe)
        import alignkit.runs.job_data
        import alignkit.training.loop  # noqa: F401
    return objective
