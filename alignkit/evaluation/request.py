"""What is asked of `alignkit eval`, checked before anything is loaded.

Importing this imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from alignkit.config.data import DataConfig
from alignkit.config.decode import DecodeConfig, is_decode_file, load_decode
from alignkit.config.recipe import REFERENCES, Recipe, load_recipe
from alignkit.data.read import held_out
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
    wrongly_accepted: float | None = None  # share of wrong answers that a verifier lets pass
    samples: int = 8
    max_new_tokens: int | None = None
    seed: int = 0
    distance: int | None = None  # samples of the reference per prompt, for runs' distance to optima
    credit: bool = False  # the shown samples with each token's log-ratio
    safe: bool = False
    # of the models that are run folders; filled by `checked`
    recipes: dict[str, Recipe] = field(default_factory=dict)
    # of the models that are files with a `decode` section; filled by `checked`
    decoders: dict[str, DecodeConfig] = field(default_factory=dict)


def checked(request: Request) -> Request:
    """The request with the recipes of its runs and its reference; what can be refused without torch
    is refused here. Checking a request again changes nothing.

    ModelError for a folder that is not there or a run that has not finished, ConfigError where
    nothing says what to measure against.
    """
    if request.wrongly_accepted is not None and request.correct is None:
        raise ConfigError(
            "--wrongly-accepted is about right and wrong answers; say with --correct SCORE from which "
            "score on an answer is right"
        )
    decoders = {name: load_decode(name) for name in request.models if is_decode_file(name)}
    finished = [name for name in request.models if name not in decoders]
    for name in (*finished, *_decoded_models(decoders), request.reference):
        if name and not name.startswith("task:"):
            find_finished(name)  # raises where there is none

    files = {name: Path(name).expanduser() / "recipe.yaml" for name in finished}
    recipes = {name: load_recipe(file) for name, file in files.items() if file.is_file()}
    reference = request.reference or _start(finished, recipes, decoders)

    # A decoder of the task's model decodes from what everything is measured against.
    decoders = {
        name: config.model_copy(update={"model": reference}) if config.model == "task" else config
        for name, config in decoders.items()
    }
    return replace(request, recipes=recipes, decoders=decoders, reference=reference)


def _decoded_models(decoders: Mapping[str, DecodeConfig]) -> list[str]:
    """Names of the models that decoders are made of."""
    names = []
    for config in decoders.values():
        others = (name for name in config.weights if name not in ("policy", "reference"))
        values = [name for name in (config.value, config.learned_twist) if name]
        names += [*([] if config.model == "task" else [config.model]), *others, *values]
    return names


def _start(
    models: Sequence[str], recipes: dict[str, Recipe], decoders: Mapping[str, DecodeConfig]
) -> str:
    """What the models were trained from."""
    starts = {name: anchor_of(recipe) for name, recipe in recipes.items()}
    starts |= {name: name for name in models if name.startswith("task:")}
    for name, config in decoders.items():
        recipe = Path(config.model).expanduser() / "recipe.yaml"
        if recipe.is_file():
            starts[name] = anchor_of(load_recipe(recipe))
        elif config.model.startswith("task:"):
            starts[name] = config.model

    # Decoders of the task's model alone are measured against that.
    if not starts and not models:
        if all(config.model == "task" for config in decoders.values()):
            return f"task:{DEFAULT_TASK}"
        raise ConfigError(
            f"nothing says what to measure {next(iter(decoders))} against; give --reference MODEL"
        )

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


def anchor_of(recipe: Recipe) -> str:
    """The reference that a run was kept close to."""
    adapter = recipe.model.adapter
    if recipe.reference.kind not in REFERENCES:
        return recipe.reference.kind
    if adapter and adapter.path:
        return adapter.path
    if recipe.model.name_or_path != "task":
        return recipe.model.name_or_path
    return recipe.data.task_source() or f"task:{DEFAULT_TASK}"


def task_of(request: Request) -> Task | None:
    """The embedded task that the request or its recipes name, for its prompts and reward."""
    recipes = request.recipes.values()
    names = [
        request.prompts,
        request.reference,
        *request.models,
        *(config.model for config in request.decoders.values()),
        *(held_out(recipe.data) for recipe in recipes),
        *(recipe.data.task_source() for recipe in recipes),
    ]
    for name in names:
        if str(name).startswith("task:"):
            return resolve(str(name))
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
    short = [Path(name).stem if is_decode_file(name) else Path(name).name for name in models]
    return short if len({*short, "base"}) == len(short) + 1 else list(models)
