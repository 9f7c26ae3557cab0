"""`alignkit iterate`: rounds of training. What it does is in `alignkit.comparison.iterate`."""

from pathlib import Path

import typer

from alignkit.cli.options import AllowPrivateJudge, Overrides, RecipeName, Safe


def iterate(
    recipe: RecipeName,
    overrides: Overrides = None,
    safe: Safe = False,
    allow_private_judge: AllowPrivateJudge = False,
) -> None:
    """Train in rounds, each from the model of the one before, and with rounds=K that many. After an
    interruption, the same command continues where it stopped.
    """
    from alignkit.config.recipe import load_recipe

    loaded = load_recipe(recipe, [in_full(change) for change in overrides or []])

    from alignkit.comparison.iterate import check_iterable
    from alignkit.comparison.iterate import iterate as run_rounds

    check_iterable(loaded, safe)
    results = run_rounds(loaded, safe=safe)
    report = Path(loaded.output_dir) / "report.html"
    typer.echo(f"{len(results['models'])} rounds; the report is {report}")


def in_full(change: str) -> str:
    """An override, with `rounds=K` as short for `iterate.rounds=K`."""
    return f"iterate.{change}" if change.startswith("rounds=") else change
