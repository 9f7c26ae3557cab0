"""`alignkit verify`: objectives against exact oracles. What it does is in `alignkit.testing`."""

from typing import Annotated

import typer

from alignkit.cli.lasting_imports import lasting_imports


def verify(
    objectives: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="OBJECTIVE",
            help="Names, or module:Class and file.py:Class; default: all that ship with alignkit.",
        ),
    ] = None,
    safe: Annotated[
        bool, typer.Option("--safe", help="Refuse to run objectives from a module or file.")
    ] = False,
) -> None:
    """Check objectives against exact oracles; exit 1 if a check fails."""
    from alignkit.objectives import OBJECTIVES, unknown_objective

    # Said before torch is imported, which takes seconds.
    for name in objectives or []:
        if name not in OBJECTIVES and ":" not in name:
            raise unknown_objective(name)

    with lasting_imports():
        from alignkit.testing import verify as verify_objectives

    raise typer.Exit(verify_objectives(objectives or [], safe=safe))
