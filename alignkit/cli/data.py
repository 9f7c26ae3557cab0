"""`alignkit data`: look at data before training. What it does is in `alignkit.data.load`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alignkit.cli.options import Overrides, Source
from alignkit.config.escaping import printable

if TYPE_CHECKING:
    from alignkit.data.cache import LazyTokenizer

app = typer.Typer(help="Look at data before training on them.", no_args_is_help=True)


@app.command("check")
def check_data(
    source: Source,
    overrides: Overrides = None,
    model: Annotated[
        str | None, typer.Option(help="Also count tokens, with this model's tokenizer.")
    ] = None,
    coverage: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Pairs: also how much of this model's law their answers cover."
        ),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(help="What the rows are for: sequence, pair, labelled, ranked or rollout."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that tokenise many rows (default: 1)."),
    ] = None,
) -> None:
    """Read every row and count what is wrong, with row numbers. Exit 3 if training would refuse the
    data.
    """
    from rich.console import Console

    from alignkit.config.recipe import load_recipe
    from alignkit.data.load import check
    from alignkit.tasks import resolve

    options = [] if workers is None else [f"data.workers={workers}"]
    # Any recipe: only its data section is used.
    config = load_recipe("dpo", [*(overrides or []), *options]).data
    tokenizer = None
    if model is not None:
        tokenizer = _tokenizer(model)

    rows = resolve(source).rows(family or "pair") if source.startswith("task:") else source
    report, refusal = check(config, tokenizer, family=family, source=rows)

    console = Console()
    if console.is_terminal and report.findings:
        console.print(report.table())
    else:
        typer.echo(printable("\n".join(report.lines())))
    if refusal is not None:
        raise refusal
    if coverage is not None:
        from alignkit.evaluation.coverage import pair_coverage

        for line in pair_coverage(coverage, rows, config).lines():
            typer.echo(line)


def _tokenizer(model: str) -> "LazyTokenizer":
    """The model's tokenizer, which takes seconds to load and is seldom needed the second time."""
    from alignkit.config.model import ModelConfig
    from alignkit.data.cache import LazyTokenizer

    def load() -> Any:
        from alignkit.policies.tokenizer import load_tokenizer

        return load_tokenizer(ModelConfig(name_or_path=model))

    return LazyTokenizer(load, Path(model).expanduser())
