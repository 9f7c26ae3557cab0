"""The command line. Sub-commands import what they need when they run, so that every help text comes
at once.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli.eval import evaluate
from alignkit.cli.options import AllowPrivateJudge, Safe
from alignkit.cli.pairs import pairs
from alignkit.errors import AlignkitError, ConfigError

app = typer.Typer(
    name="alignkit",
    help="KL-regularised RLHF and preference optimisation: fine-tune by a recipe, compare objectives, verify them.",
    epilog="Exit codes: 0 done, 2 usage or config, 3 data, 4 model, 5 numerical stop, 6 checkpoint, 7 resources, "
    "130 and 143 on SIGINT and SIGTERM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="The recipes that ship with the package.", no_args_is_help=True)
data_app = typer.Typer(help="Look at data before training on them.", no_args_is_help=True)
checkpoint_app = typer.Typer(help="Look at the checkpoints of a run.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or the name of a recipe that ships with alignkit."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FIELD=VALUE", help="Changes, such as train.steps=100 objective.beta=0.2."
    ),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="auto|PATH", help="Go on from the newest checkpoint, or from one."),
    ] = None,
    safe: Safe = False,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes on this machine, such as one per GPU.")
    ] = 1,
    allow_private_judge: AllowPrivateJudge = False,
) -> None:
    """Train a model by a recipe."""
    from alignkit.config.recipe import load_recipe
    from alignkit.runs.checks import check_without_torch
    from alignkit.runs.launch import resolve_task, run_recipe

    loaded = load_recipe(recipe, overrides or [])
    check_without_torch(loaded, safe)
    if processes > 1:
        from alignkit.distributed.launcher import launch

        resolve_task(loaded)  # once, before there are several processes
        options = [*(["--resume", resume] if resume else []), *(["--safe"] if safe else [])]
        raise typer.Exit(launch(processes, ["train", recipe, *(overrides or []), *options]))
    result = run_recipe(loaded, resume, safe=safe)
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"{result.step} steps done; the model is in {Path(loaded.output_dir) / 'model'}")


@app.command()
def compare(
    recipe: RecipeName,
    overrides: Overrides = None,
    safe: Safe = False,
    allow_private_judge: AllowPrivateJudge = False,
) -> None:
    """Compare objectives on one task: a grid of runs, one report. The same command goes on where it
    was stopped.
    """
    from alignkit.comparison.grid import expand
    from alignkit.config.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    expand(loaded)  # refuses what it can before the seconds that importing torch takes
    from alignkit.comparison.compare import compare as run_comparison

    found = run_comparison(loaded, safe=safe)
    failed = sum(run["status"] == "failed" for run in found["runs"])
    typer.echo(
        f"{len(found['runs'])} runs, {failed} failed; the report is {Path(loaded.output_dir) / 'report.html'}"
    )


app.command(name="eval")(evaluate)
app.command()(pairs)


@app.command()
def verify(
    objectives: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="OBJECTIVE",
            help="Names, or module:Class and file.py:Class; default: all built in.",
        ),
    ] = None,
    safe: Annotated[
        bool, typer.Option("--safe", help="Refuse to run objectives of one's own.")
    ] = False,
) -> None:
    """Check objectives against exact oracles; exit 1 if a check fails."""
    from alignkit.testing import verify as verify_objectives

    raise typer.Exit(verify_objectives(objectives or [], safe=safe))


@recipes_app.command("list")
def list_recipes() -> None:
    """Name every recipe with its first comment."""
    from alignkit.config.recipe import shipped_recipes

    for name, file in shipped_recipes().items():
        typer.echo(f"{name:19} {file.read_text().partition(chr(10))[0].lstrip('# ')}")


@recipes_app.command("show")
def show_recipe(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print a recipe with every field."""
    from alignkit.config.recipe import dump_recipe, load_recipe

    typer.echo(dump_recipe(load_recipe(recipe, overrides or [])), nl=False)


@recipes_app.command("copy")
def copy_recipe(
    recipe: RecipeName,
    to: Annotated[
        Path | None, typer.Argument(help="File to write; default: RECIPE.yaml here.")
    ] = None,
) -> None:
    """Copy a recipe to a file of your own, to change it."""
    from alignkit.config.recipe import find_recipe

    source = find_recipe(recipe)
    target = to or Path(source.name)
    if target.exists():
        raise ConfigError(f"{target} exists already; name another file")
    target.write_text(source.read_text())
    typer.echo(
        f"{target}: train with `alignkit train {target if target.name != str(target) else './' + target.name}`"
    )


@data_app.command("check")
def check_data(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH_OR_NAME", help="A file, a data set folder, a hub name, or task:NAME."
        ),
    ],
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="Also count tokens, with this model's tokenizer.")
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="What the rows are for: sequence, pair, labelled or rollout.")
    ] = None,
) -> None:
    """Read every row and count verdicts, with row numbers. Exit 3 if training would refuse the
    data.
    """
    from rich.console import Console

    from alignkit.config.recipe import load_recipe
    from alignkit.data.load import check
    from alignkit.tasks import resolve

    config = load_recipe("dpo", overrides or []).data  # any recipe: only its data section is used
    tokenizer = None
    if model is not None:
        from alignkit.config.model import ModelConfig
        from alignkit.policies.load import load_tokenizer

        tokenizer = load_tokenizer(ModelConfig(name_or_path=model))
    rows = resolve(source).rows(family or "pair") if source.startswith("task:") else source
    report, refusal = check(config, tokenizer, family=family, source=rows)
    console = Console()
    if console.is_terminal and report.findings:
        console.print(report.table())
    else:
        typer.echo("\n".join(report.lines()))
    if refusal is not None:
        raise refusal


@app.command()
def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A run folder, a model folder, a hub name, or task:NAME."
        ),
    ],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT")],
    completions: Annotated[int, typer.Option(min=1, help="Completions to sample.")] = 1,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cap on the tokens of a completion; default: 64, or what the context leaves.",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling noise.")] = 0,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Send the prompt as a user's message, through the chat template."
        ),
    ] = False,
) -> None:
    """Sample completions of a prompt."""
    from alignkit.rollout.generate import generate as sample
    from alignkit.runs.trained_model import load_finished

    asked = [{"role": "user", "content": prompt}] if chat else prompt
    texts = sample(
        load_finished(model),
        [asked],
        completions=completions,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    for text in texts[0]:
        typer.echo(text)


@app.command()
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


@checkpoint_app.command("list")
def list_checkpoints(run: Run) -> None:
    """List a run's checkpoints, oldest first."""
    _print_checkpoints(run)


@checkpoint_app.command("verify")
def verify_checkpoints(run: Run) -> None:
    """Check every file of every checkpoint against its SHA-256. Exit 6 if one is damaged."""
    from alignkit.errors import CheckpointError

    damaged = _print_checkpoints(run)
    if damaged:
        raise CheckpointError(
            f"{run}: {damaged} damaged; `alignkit train ... --resume auto` passes them over"
        )


def _print_checkpoints(run: Path) -> int:
    """Print one line per checkpoint; the number of damaged ones."""
    from alignkit.errors import CheckpointError
    from alignkit.training import checkpoint

    verdicts = checkpoint.verify(run / "checkpoints")
    if not verdicts:
        raise CheckpointError(
            f"{run} holds no checkpoints (looked for {run / 'checkpoints' / 'step-N'})"
        )
    for verdict in verdicts:
        typer.echo(
            f"{verdict.path}  {'whole' if verdict.reason is None else verdict.reason}{'  (best)' if verdict.best else ''}"
        )
    return sum(verdict.reason is not None for verdict in verdicts)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (default: sys.argv). The one place where an error becomes a line on
    stderr and an exit code.
    """
    # read when the hub's library is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # outside of training, which saves first
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app(arguments)
    except AlignkitError as error:
        rank = os.environ.get("RANK")
        typer.echo(f"alignkit: {f'rank {rank}: ' if rank else ''}{error}", err=True)
        sys.exit(error.exit_code)
