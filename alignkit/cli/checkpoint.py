"""`alignkit checkpoint`: list, verify and consolidate a run's checkpoints. What it does is in
`alignkit.training.checkpoint`.
"""

from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli.options import Run
from alignkit.errors import CheckpointError

app = typer.Typer(help="Look at the checkpoints of a run.", no_args_is_help=True)


@app.command("list")
def list_checkpoints(run: Run) -> None:
    """List a run's checkpoints, oldest first."""
    verdicts = _checkpoints(run)
    if not verdicts:
        raise CheckpointError(
            f"{run} holds no checkpoints (looked for {run / 'checkpoints' / 'step-N'})"
        )
    _print(verdicts)


@app.command("verify")
def verify_checkpoints(run: Run) -> None:
    """Check every file of every checkpoint, of the finished model and of the reference's store
    against its SHA-256. Exit 6 if one is damaged.
    """
    verdicts = [*_checkpoints(run), *_model(run), *_store(run)]
    if not verdicts:
        raise CheckpointError(
            f"{run} holds no checkpoints (looked for {run / 'checkpoints' / 'step-N'}) and no model"
        )

    _print(verdicts)
    damaged = [path for path, reason, _ in verdicts if reason is not None]
    if not damaged:
        return
    message = f"{run}: {len(damaged)} damaged"
    if all(path.parent == run / "checkpoints" for path in damaged):
        message += "; `alignkit train ... --resume auto` passes them over"
    raise CheckpointError(message)


@app.command("consolidate")
def consolidate_checkpoint(
    run: Run,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; by default RUN/consolidated.")
    ] = None,
) -> None:
    """Write the newest whole checkpoint of a run as a model that from_pretrained loads, tensor by
    tensor, whatever number of processes saved it.
    """
    from alignkit.runs.consolidate import consolidate

    folder = out or run / "consolidated"
    step = consolidate(run, folder)
    typer.echo(f"step {step} of {run} is in {folder}")


Line = tuple[Path, str | None, bool]  # what was checked, what is wrong with it, whether it is best


def _checkpoints(run: Path) -> list[Line]:
    from alignkit.training import checkpoint

    verdicts = checkpoint.verify(run / "checkpoints")
    return [(verdict.path, verdict.reason, verdict.best) for verdict in verdicts]


def _model(run: Path) -> list[Line]:
    """The finished model, if it has a manifest; models of earlier versions have none."""
    from alignkit.files import MANIFEST, check_manifest

    folder = run / "model"
    return [(folder, check_manifest(folder), False)] if (folder / MANIFEST).exists() else []


def _store(run: Path) -> list[Line]:
    """The files of the store that the run's recipe names."""
    from alignkit.config.recipe import load_recipe

    recipe = run / "recipe.yaml"
    store = load_recipe(recipe).reference.store if recipe.is_file() else None
    if store is None:
        return []

    from alignkit.policies.store import damage

    return [
        (file, damage(file), False)
        for file in sorted(Path(store).expanduser().glob("*.safetensors"))
        if not file.name.startswith(".")
    ]


def _print(lines: list[Line]) -> None:
    for path, reason, best in lines:
        state = "whole" if reason is None else reason
        typer.echo(f"{path}  {state}{'  (best)' if best else ''}")
