"""Arguments and options that several commands have."""

import os
from pathlib import Path
from typing import Annotated

import typer


def _allow_private_judge(given: bool) -> None:
    """Put into the environment, which the processes of a run inherit and no recipe can set."""
    if given:
        from alignkit.config.judges import ALLOW_PRIVATE

        os.environ[ALLOW_PRIVATE] = "1"


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or the name of a recipe that ships with alignkit."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FIELD=VALUE",
        help="Changes to the recipe, such as train.steps=100 objective.beta=0.2.",
    ),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A run folder, a model folder, a hub name, or task:NAME."),
]
Source = Annotated[
    str,
    typer.Argument(
        metavar="PATH_OR_NAME", help="A file, a dataset folder, a hub name, or task:NAME."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sampling noise.")]
Temperature = Annotated[
    float, typer.Option(min=0, help="Sampling temperature; 0 takes the most likely token.")
]
Safe = Annotated[
    bool, typer.Option("--safe", help="Refuse to run code that the recipe or the model brings.")
]
AllowPrivateJudge = Annotated[
    bool,
    typer.Option(
        "--allow-private-judge",
        callback=_allow_private_judge,
        help="Let judge.chat.url be an address of a private network.",
    ),
]
