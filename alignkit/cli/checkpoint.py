"""`alignkit checkpoint`: list and verify a run's checkpoints. What it does is in
`alignkit.training.checkpoint`.
"""

from pathlib import Path

import typer

from alignkit.cli.options import Run

app = typer.Typer(help="Look at the checkpoints of a run.", no_args_is_help=True)


@app.command("list")
def list_checkpoints(run: Run) -> None:
    """List a run's checkpoints, oldest first."""
    _print_checkpoints(run)


@app.command("verify")
def verify_checkpoints(run: Run) -> None:
    """Check every file of every checkpoint against its SHA-256. Exit 6 if one is damaged."""
    from alignkit.errors import CheckpointError

    damaged = _print_checkpoints(run)
    if damaged:
        raise CheckpointError(
            f"{run}: {damaged} damaged; `alignkit train ... --resume auto` passes them over"
        )


def _print_checkpoints(run: Path) -> int:
    """Print one line per checkpoint and return the number of damaged ones."""
    from alignkit.errors import CheckpointError
    from alignkit.training import checkpoint

    verdicts = checkpoint.verify(run / "checkpoints")
    if not verdicts:
        raise CheckpointError(
            f"{run} holds no checkpoints (looked for {run / 'checkpoints' / 'step-N'})"
        )

    for verdict in verdicts:
        state = "whole" if verdict.reason is None else verdict.reason
        best = "  (best)" if verdict.best else ""
        typer.echo(f"{verdict.path}  {state}{best}")
    return sum(verdict.reason is not None for verdict in verdicts)
