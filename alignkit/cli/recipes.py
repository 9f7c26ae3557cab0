"""`alignkit recipes`: list, show and copy the recipes that ship with the package."""

from pathlib import Path
from typing import Annotated

import typer

from alignkit.cli.options import Overrides, RecipeName
from alignkit.errors import ConfigError
from alignkit.files import write_text, writing

app = typer.Typer(help="The recipes that ship with the package.", no_args_is_help=True)


@app.command("list")
def list_recipes() -> None:
    """List every recipe with its first comment."""
    from alignkit.config.recipe import shipped_recipes

    for name, file in shipped_recipes().items():
        first_line = file.read_text().partition("\n")[0]
        typer.echo(f"{name:19} {first_line.lstrip('# ')}")


@app.command("show")
def show_recipe(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print a recipe with every field."""
    from alignkit.config.recipe import dump_recipe, load_recipe

    typer.echo(dump_recipe(load_recipe(recipe, overrides or [])), nl=False)


@app.command("copy")
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
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, source.read_text(encoding="utf-8"))

    # A bare name could also be that of a shipped recipe; `./` makes it this file.
    path = f"./{target}" if target.name == str(target) else str(target)
    typer.echo(f"{target}: train with `alignkit train {path}`")
