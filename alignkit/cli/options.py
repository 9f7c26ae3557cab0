"""Options that several sub-commands have."""

import os
from typing import Annotated

import typer


def _allow_private_judge(given: bool) -> None:
    """In the environment, which the processes of a run inherit and no recipe can set."""
    if given:
        from alignkit.config.judges import ALLOW_PRIVATE

        os.environ[ALLOW_PRIVATE] = "1"


AllowPrivateJudge = Annotated[
    bool,
    typer.Option(
        "--allow-private-judge",
        callback=_allow_private_judge,
        help="Let judge.chat.url be an address of a private network.",
    ),
]
Safe = Annotated[
    bool, typer.Option("--safe", help="Refuse to run code that the recipe or the model brings.")
]
