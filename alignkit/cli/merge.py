"""`alignkit merge`: a LoRA adapter into its base. What it does is in `alignkit.policies.load`."""

from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli.options import Run
from alignkit.errors import ConfigError


def merge(
    run: Run,
    to: Annotated[
        Path | None, typer.Option(help="Folder for the merged model; default: RUN/merged.")
    ] = None,
) -> None:
    """Fold a run's LoRA adapter into its base model."""
    from alignkit.policies.load import merge as merge_adapter

    target = to or run / "merged"
    if target.exists():
        raise ConfigError(f"{target} exists already; name another folder with --to")
    merge_adapter(run, target)
    typer.echo(f"{target}: the merged model")
