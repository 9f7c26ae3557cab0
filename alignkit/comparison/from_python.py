"""`alignkit.compare`: what `alignkit compare` does, from Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.config.recipe import Recipe, load_recipe


def compare(
    recipe: str | Path | Recipe, overrides: Sequence[str] = (), *, safe: bool = False
) -> dict[str, Any]:
    """What `alignkit compare` does: a grid of objectives, one report; its results as a dict.

    `recipe` is a file, a shipped recipe's name or a loaded one, `overrides` are
    `section.field=value`.
    """
    from alignkit.comparison.compare import compare as compare_recipe

    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    return dict(compare_recipe(loaded, safe=safe))
