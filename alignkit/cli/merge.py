"""`alignkit merge`: a LoRA adapter into its base, or several models into one. What it does is in
`alignkit.policies.load` and `alignkit.runs.merge`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from typer.core import TyperCommand

from alignkit.errors import ConfigError

SEVERAL = ("--weights", "--share")


class NumbersCommand(TyperCommand):
    """A command whose options of `SEVERAL` take all the numbers that follow them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`--share 0.3 0.5` stands for `--share 0.3 --share 0.5`."""
        expanded: list[str] = []
        option = None
        for argument in args:
            if argument in SEVERAL:
                option = argument
            elif option is not None and _is_number(argument):
                expanded += [option, argument]
            else:
                option = None
                expanded.append(argument)
        return super().parse_args(ctx, expanded)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def merge(
    models: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Run folders, models or adapters of one start."),
    ],
    to: Annotated[
        Path | None,
        typer.Option(help="Folder for the merged model; default for one LoRA run: RUN/merged."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="linear: weighted sum of task vectors; slerp: along the sphere.")
    ] = "linear",
    weights: Annotated[
        list[float] | None, typer.Option(help="One per model; default: equal, with the sum 1.")
    ] = None,
    toward: Annotated[
        str | None, typer.Option(help="The model that all started from; default: as they say.")
    ] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(help="How far to go from the start; several numbers: a folder for each."),
    ] = None,
    tensors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN=W,W",
            help="Weights of the tensors whose names match, such as '*.mlp.*=0.2,0.8'; may be given "
            "several times, the first that matches counts.",
        ),
    ] = None,
    fit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PROMPTS",
            help="Find the weights: the merge is to be close to each model on these prompts. One "
            "file for all, or the option once per model.",
        ),
    ] = None,
) -> None:
    """Fold a run's LoRA adapter into its base model, or merge several models into one."""
    kind = method_called(method)
    given = weights or toward or share or tensors or fit
    folds = len(models) == 1 and not (given or method != "linear")
    target = _target(to, models[0], folds)
    if folds:
        _fold(models[0], target)
        typer.echo(f"{target}: the merged model")
        return

    from alignkit.runs.merge import MergeRequest, merge_models

    by_name = dict(map(tensor_weights, tensors or []))
    request = MergeRequest(
        models, target, kind, weights or None, toward, share or [1.0], by_name, fit or ()
    )
    for folder in merge_models(request):
        typer.echo(f"{folder}: the merged model")


def _target(to: Path | None, run: str, folds: bool) -> Path:
    """The folder for the merged model. ConfigError where it is not named or exists."""
    if to is None and not folds:
        raise ConfigError("merge: name a folder for the merged model with --to")
    target = to or Path(run) / "merged"
    if target.exists():
        raise ConfigError(f"{target} exists already; name another folder with --to")
    return target


def method_called(name: str) -> Literal["linear", "slerp"]:
    """The method of that name. ConfigError where there is none."""
    if name not in ("linear", "slerp"):
        raise ConfigError(f"merge: there is no method `{name}`; it is linear or slerp")
    return cast(Literal["linear", "slerp"], name)


def _fold(run: str, target: Path) -> None:
    """Fold a run's adapter into its base, in the dtype that its recipe saves in."""
    from alignkit.config.recipe import load_recipe
    from alignkit.policies.folding import merge as fold

    recipe = Path(run) / "recipe.yaml"
    dtype = load_recipe(recipe).model.save_dtype if recipe.is_file() else "auto"
    fold(run, target, dtype=dtype)


def tensor_weights(text: str) -> tuple[str, list[float]]:
    """`PATTERN=W,W` as a pattern and its weights. ConfigError for anything else."""
    pattern, _, numbers = text.rpartition("=")
    weights = numbers.split(",")
    if not pattern or not all(map(_is_number, weights)):
        raise ConfigError(
            f"merge: --tensors is {text}; write PATTERN=W,W with a number for each model, such as "
            "'*.mlp.*=0.2,0.8'"
        )
    return pattern, [float(weight) for weight in weights]
