"""The recipe: every section as a strict model, read from YAML and overrides. Imports no torch."""

from importlib import import_module

_RECIPE_NAMES = ("Recipe", "load_recipe", "build_objective", "dump_recipe", "shipped_recipes")
__all__ = sorted(_RECIPE_NAMES)


def __getattr__(name: str) -> object:
    if name in _RECIPE_NAMES:
        return getattr(import_module("alignkit.config.recipe"), name)
    raise AttributeError(f"alignkit.config has no {name!r}; it has {', '.join(__all__)}")
