"""All commands together, and the one place where an error becomes a line on stderr and an exit
code.
"""

import os
import signal
import sys
from typing import Any

import typer
import typer.core

from alignkit.cli.checkpoint import app as checkpoint_app
from alignkit.cli.compare import compare
from alignkit.cli.data import app as data_app
from alignkit.cli.eval import evaluate
from alignkit.cli.fit_target import fit_target
from alignkit.cli.generate import generate
from alignkit.cli.iterate import iterate
from alignkit.cli.merge import NumbersCommand, merge
from alignkit.cli.pairs import pairs
from alignkit.cli.plan import plan
from alignkit.cli.recipes import app as recipes_app
from alignkit.cli.train import train
from alignkit.cli.verify import verify
from alignkit.config.escaping import printable
from alignkit.distributed.threads import wait_briefly
from alignkit.errors import AlignkitError, ConfigError
from alignkit.training.messages import shown_messages

TERMINATED = 128 + signal.SIGTERM


class NoQuietExit(typer.core.TyperGroup):
    """Commands that no code of the user's ends in silence. They themselves never call sys.exit; a
    reward or an import that does would end a run as if it were done.
    """

    def invoke(self, ctx: typer.Context) -> Any:
        """As the base class. ConfigError for a SystemExit that is not SIGTERM's."""
        try:
            return super().invoke(ctx)
        except SystemExit as error:
            if error.code == TERMINATED:
                raise
            raise ConfigError(
                f"code that this command was given called sys.exit({error.code!r}), which would "
                "end it before it is done; let the code raise an exception or return instead"
            ) from error


app = typer.Typer(
    cls=NoQuietExit,
    name="alignkit",
    help="KL-regularised RLHF and preference optimisation: fine-tune by a recipe, compare "
    "objectives, verify them.",
    epilog="Exit codes: 0 done, 2 usage or config, 3 data, 4 model, 5 numerical stop, "
    "6 checkpoint, 7 resources, 130 and 143 on SIGINT and SIGTERM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(plan)
app.command()(compare)
app.command()(iterate)
app.command("eval")(evaluate)
app.command()(verify)
app.command()(generate)
app.command()(pairs)
app.command("fit-target")(fit_target)
app.command(cls=NumbersCommand)(merge)
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (default: sys.argv)."""
    # The hub's library reads this when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    wait_briefly()
    # Training replaces this handler by one that saves first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))

    try:
        with shown_messages():
            app(arguments)
    except AlignkitError as error:
        rank = os.environ.get("RANK")
        speaker = f"rank {rank}: " if rank else ""
        typer.echo(f"alignkit: {speaker}{printable(error)}", err=True)
        sys.exit(error.exit_code)
