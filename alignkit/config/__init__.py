"""The recipe: every section as a strict model, read from YAML and overrides.

    recipe.py        all sections together, and how a recipe is found, read, checked and written
    objective.py     the `objective` section, and the objective that it describes
    model.py, teacher.py, data.py, train.py, rollout.py, rewards.py, judges.py, compare.py,
                     iterate.py: one section each
    section.py       their base class
    text.py          from YAML and `a.b=value` to plain data, with line numbers
    validation.py    from plain data to sections, with every fault explained
    plugins.py       loads a user's own code from `module:name` or `file.py:name`

Names load when they are used. No torch is imported until an objective is built.
"""

from importlib import import_module

_LAZY = {
    "Recipe": "alignkit.config.recipe",
    "load_recipe": "alignkit.config.recipe",
    "dump_recipe": "alignkit.config.recipe",
    "shipped_recipes": "alignkit.config.recipe",
    "build_objective": "alignkit.config.objective",
}
__all__ = sorted(_LAZY)


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"alignkit.config has no {name!r}; it has {', '.join(__all__)}")
