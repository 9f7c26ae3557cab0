"""What a recipe names outside of itself, models and code, as far as it can be checked before torch is
imported: that a path leads somewhere.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from alignkit.config.model import check_adapter, check_reward_model, check_source
from alignkit.config.objective import parts_of
from alignkit.config.peft_fields import peft_kinds
from alignkit.config.plugins import check_spec
from alignkit.config.recipe import REFERENCES, Recipe
from alignkit.config.rewards import RewardConfig
from alignkit.config.validation import nearest
from alignkit.errors import ConfigError
from alignkit.runs.live import PREFIX


def check_named(recipe: Recipe, safe: bool) -> None:
    """Refuse code and models that are not there, and code of any kind when `safe`. ConfigError or
    ModelError.
    """
    adapter = recipe.model.adapter
    if adapter is not None and adapter.peft:
        check_peft(adapter.peft, recipe.origin.at(("model", "adapter", "peft")))
    if adapter is not None and adapter.path is not None and not adapter.path.startswith(PREFIX):
        check_adapter(adapter.path)

    for what, spec in _code(recipe):
        if not spec.startswith(PREFIX):
            check_spec(spec, what=what, safe=safe)

    for check, named in ((check_source, _models), (check_reward_model, _reward_models)):
        for what, name in named(recipe):
            if not name.startswith((PREFIX, "task:")) and name != "task":
                check(name, what)


def check_peft(settings: Mapping[str, Any], place: str) -> None:
    """Refuse a peft_type and fields that the installed peft does not have. ConfigError."""
    known = peft_kinds()
    kind = str(settings.get("peft_type", "LORA")).upper()
    if not known:
        return
    if kind not in known:
        raise ConfigError(
            f"{place}: `model.adapter.peft`: peft knows no peft_type {kind}.{nearest(kind, known)} "
            f"It knows {', '.join(sorted(known))}"
        )

    name, fields = known[kind]
    unknown = sorted(settings.keys() - fields - {"peft_type"})
    if fields and unknown:
        raise ConfigError(
            f"{place}: `model.adapter.peft`: {name} of the installed peft has no field "
            f"{', '.join(unknown)}.{nearest(unknown[0], fields)}"
        )


def _code(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What errors call a field -> `module:name` or `file.py:name` in it."""
    parts = [part for keys, section in recipe.objectives() for part in parts_of(section, keys)]
    for keys, part in parts:
        if "import" in part:
            at = recipe.origin.at((*keys, "import"))
            yield f"{at}: {'.'.join(keys)}.import", part["import"]

    for field, reward in _rewards(recipe):
        if reward.function is not None:
            yield f"{field}.function", reward.function
        if reward.verifier is not None:
            yield f"{field}.verifier", reward.verifier

    judge = recipe.judge
    if judge is not None and judge.function is not None:
        yield "judge.function", judge.function
    if judge is not None and judge.trl is not None:
        yield "judge.trl", judge.trl
    if recipe.rollout.environment is not None:
        yield "rollout.environment", recipe.rollout.environment
    for tool in recipe.rollout.tools:
        yield "rollout.tools", tool
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

    for field, reward in _rewards(recipe):
        if reward.rewriter is not None:
            yield f"{field}.rewriter", reward.rewriter
    if recipe.judge is not None and recipe.judge.model is not None:
        yield "judge.model", recipe.judge.model


def _reward_models(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Field -> path or hub name of a reward model in it."""
    for field, reward in _rewards(recipe):
        if reward.model is not None:
            yield f"{field}.model", reward.model
        for name in reward.ensemble or []:
            yield f"{field}.ensemble", name


def _rewards(recipe: Recipe) -> Iterator[tuple[str, RewardConfig]]:
    for number, reward in enumerate(recipe.rewards):
        yield f"rewards.{number}", reward
    for number, reward in enumerate((recipe.judge and recipe.judge.rewards) or []):
        yield f"judge.rewards.{number}", reward
