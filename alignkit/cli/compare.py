"""`alignkit compare`: a grid of runs. What it does is in `alignkit.comparison.compare`."""

from pathlib import Path

import typer

from alignkit.cli.options import AllowPrivateJudge, Overrides, RecipeName, Safe


def compare(
    recipe: RecipeName,
    overrides: Overrides = None,
    safe: Safe = False,
    allow_private_judge: AllowPrivateJudge = False,
) -> None:
    """Compare objectives on one task: a grid of runs and one report. After an interruption, the
    same command continues where it stopped.
    """
    from alignkit.comparison.grid import expand
    from alignkit.config.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    expand(loaded)  # refuses what it can before the seconds that importing torch takes

    from alignkit.comparison.compare import compare as run_comparison

    runs = run_comparison(loaded, safe=safe)["runs"]
    failed = sum(run["status"] == "failed" for run in runs)
    stale = sum(run["status"] == "stale" for run in runs)
    left_out = f", {stale} stale and left out" if stale else ""
    report = Path(loaded.output_dir) / "report.html"
    typer.echo(f"{len(runs)} runs, {failed} failed{left_out}; the report is {report}")
