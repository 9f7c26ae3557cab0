"""What is asked of `alignkit eval`, checked before anything is loaded.

Importing this imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from alignkit.config.data import DataConfig
from alignkit.config.recipe import REFERENCES, Recipe, load_recipe
from alignkit.errors import ConfigError
from alignkit.runs.trained_model import find_finished
from alignkit.tasks import DEFAULT_TASK, Task, resolve


@dataclass(frozen=True)
class Request:
    """What is asked of `alignkit eval`. None: what the runs' recipes, then their task, say."""

    models: Sequence[str]
    reference: str | None = None  # what KL is measured from
    prompts: str | None = None
    reward: str | None = None  # file.py:function or module:function
    pairs: str | None = None  # held-out preference pairs
    text: str | None = None  # held-out text, for perplexity
    unrelated: str | None = None  # prompts that training had nothing to do with
    correct: float | None = None  # a completion that scores at least this is right
    samples: int = 8
    max_new_tokens: int | None = None
    seed: int = 0
    safe: bool = False
    # of the models that are run folders; filled by `checked`
    recipes: dict[str, Recipe] = field(default_factory=dict)


def checked(request: Request) -> Request:
    """The request with the recipes of its runs and its reference; what can be refused without torch
    is refused here. Checking a request again changes nothing.

    ModelError for a folder that is not there or a run that has not finished, ConfigError where
    nothing says what to measure against.
    """
    for name in (*request.models, request.reference):
        if name and not name.startswith("task:"):
            find_finished(name)  # raises where there is none

    files = {name: Path(name).expanduser() / "recipe.yaml" for name in request.models}
    recipes = {name: load_recipe(file) for name, file in files.items() if file.is_file()}
    reference = request.reference or _start(request.models, recipes)
    return replace(request, recipes=recipes, reference=reference)


def _start(models: Sequence[str], recipes: dict[str, Recipe]) -> str:
    """What the models were trained from."""
    starts = {name: _anchor(recipe) for name, recipe in recipes.items()}
    starts |= {name: name for name in models if name.startswith("task:")}
    if not starts:
        raise ConfigError(
            f"there is no run folder {models[0]}, so nothing says what it was trained from; "
            "give --reference MODEL"
        )
    if len(set(starts.values())) > 1:
        listed = ", ".join(f"{name} from {start}" for name, start in starts.items())
        raise ConfigError(
            f"the models do not share one start: {listed}; "
            "say with --reference what to measure them all against"
        )
    return next(iter(starts.values()))


def _anchor(recipe: Recipe) -> str:
    """The reference that a run was kept close to."""
    adapter = recipe.model.adapter
    if recipe.reference.kind not in REFERENCES:
        return recipe.reference.kind
    if adapter and adapter.path:
        return adapter.path
    if recipe.model.name_or_path != "task":
        return recipe.model.name_or_path
    return recipe.data.train if recipe.data.train.startswith("task:") else f"task:{DEFAULT_TASK}"


def task_of(request: Request) -> Task | None:
    """The embedded task that the request or its recipes name, for its prompts and reward."""
    recipes = request.recipes.values()
    names = [
        request.prompts,
        request.reference,
        *request.models,
        *(recipe.data.eval for recipe in recipes),
        *(recipe.data.train for recipe in recipes),
    ]
    for name in names:
        if name and name.startswith("task:"):
            return resolve(name)
    return None


def data_of(recipe: Recipe | None, *, given: bool) -> DataConfig:
    """How rows are read: as by the run, except that the format is found anew, and the columns of a
    file that is `given` too.
    """
    if recipe is None:
        return DataConfig()
    changes: dict[str, object] = {"format": "auto"}
    if given:
        changes["columns"] = {}
    return recipe.data.model_copy(update=changes)


def labels_of(models: Sequence[str]) -> list[str]:
    """Short names where they are different, else as given."""
    short = [Path(name).name for name in models]
    return short if len({*short, "base"}) == len(short) + 1 else list(models)
