"""What a recipe names outside of itself, models and code, as far as it can be checked before torch is
imported: that a path leads somewhere.
"""

from collections.abc import Iterator

from alignkit.config.model import check_source
from alignkit.config.objective import parts_of
from alignkit.config.plugins import check_spec
from alignkit.config.recipe import REFERENCES, Recipe
from alignkit.config.rewards import RewardConfig
from alignkit.runs.live import PREFIX


def check_named(recipe: Recipe, safe: bool) -> None:
    """Refuse code and models that are not there, and code of any kind when `safe`. ConfigError or
    ModelError.
    """
    for what, spec in _code(recipe):
        if not spec.startswith(PREFIX):
            check_spec(spec, what=what, safe=safe)

    for what, name in _models(recipe):
        if not name.startswith((PREFIX, "task:")) and name != "task":
            check_source(name, what)


def _code(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What errors call a field -> `module:name` or `file.py:name` in it."""
    for keys, part in parts_of(recipe.objective):
        if "import" in part:
            at = recipe.origin.at((*keys, "import"))
            yield f"{at}: {'.'.join(keys)}.import", part["import"]

    for field, reward in _rewards(recipe):
        if reward.function is not None:
            yield f"{field}.function", reward.function

    judge = recipe.judge
    if judge is not None and judge.function is not None:
        yield "judge.function", judge.function
    for callback in recipe.train.callbacks:
        yield "train.callbacks", callback
    if recipe.train.compute_metrics is not None:
        yield "train.compute_metrics", recipe.train.compute_metrics


def _models(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Field -> path or hub name of a model in it, unless a store may make the model needless."""
    yield "model.name_or_path", recipe.model.name_or_path
    if recipe.reference.kind not in REFERENCES and recipe.reference.store is None:
        yield "reference.kind", recipe.reference.kind
    if recipe.teacher is not None and recipe.teacher.store is None:
        yield "teacher.name_or_path", recipe.teacher.name_or_path


def _rewards(recipe: Recipe) -> Iterator[tuple[str, RewardConfig]]:
    for number, reward in enumerate(recipe.rewards):
        yield f"rewards.{number}", reward
    for number, reward in enumerate((recipe.judge and recipe.judge.rewards) or []):
        yield f"judge.rewards.{number}", reward
