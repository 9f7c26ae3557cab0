"""`alignkit.train`: a run from Python, with live objects.

It takes the same path as a recipe. One is made from its arguments and stands in the run folder as
`recipe.yaml`; objects that have no name there are called `python:...` with a hash of their content.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.config.recipe import Recipe
from alignkit.config.section import Section
from alignkit.config.text import Origin
from alignkit.config.validation import nearest, validated
from alignkit.errors import ConfigError
from alignkit.runs.live import (
    LiveTask,
    name_of_function,
    name_of_model,
    name_of_rows,
    rows_of,
)

if TYPE_CHECKING:
    import pandas

    from alignkit.objectives.base import Objective

# Sections whose fields may be given by keyword, without their section's name.
SECTIONS = ("train", "rollout", "data", "model", "reference")
NAMED_SECTIONS = (*SECTIONS, "target", "teacher", "trackers")


@dataclass(frozen=True)
class TrainedModel:
    """A finished run."""

    model: Any  # the trained transformers or peft model: the object that was given, or a loaded one
    tokenizer: Any
    metrics: "pandas.DataFrame"  # one row per optimiser step: the run's metrics.jsonl
    folder: Path  # the run folder


def train(
    objective: "Objective",
    *,
    model: Any,
    data: Any,
    output_dir: str | Path,
    tokenizer: Any = None,
    eval_data: Any = None,
    rewards: Any = None,
    judge: Any = None,
    resume: str | None = None,
    safe: bool = False,
    **settings: Any,
) -> TrainedModel:
    """Train `model` with `objective` and return it with its metrics and its run folder.

    - `model`: a transformers causal language model or a peft model (trained in place; needs its
      `tokenizer`), or a folder, a hub name or "task"
    - `data`, `eval_data`: a list of rows (dicts), a `datasets.Dataset`, a pandas frame, or what
      `data.train` takes in a recipe
    - `rewards`: a function `f(prompts, completions, **columns) -> list`, or a list of functions,
      whose scores are added
    - `judge`: a function `f(prompts, first, second)` that gives the probability that the first wins
    - any field of the sections train, rollout, data, model and reference by keyword (`steps=300,
      learning_rate=5e-6`), or a whole section as a mapping (`train={"steps": 300}`); a field that
      several sections have has to stand in its section
    - `resume`: None, "auto" or a checkpoint folder, as on the command line

    Raises the errors of the command line: ConfigError for arguments, DataError for rows, ModelError
    for models, and so on.

    >>> run = train(DPO(beta=0.1), model=model, tokenizer=tokenizer, data=pairs,
    ...             output_dir="runs/mine", steps=300, learning_rate=5e-6)  # doctest: +SKIP
    """
    from alignkit.runs.launch import resolve_task, run_with_task
    from alignkit.training.run_folder import RunFolder

    live_model = None if isinstance(model, str | Path) else model
    if live_model is not None and tokenizer is None:
        raise ConfigError("tokenizer: a model that is given as an object needs its tokenizer")
    train_rows = None if isinstance(data, str | Path) else rows_of(data, "data")
    eval_rows = None
    if eval_data is not None and not isinstance(eval_data, str | Path):
        eval_rows = rows_of(eval_data, "eval_data")

    sections = _sections(settings)
    sections["objective"] = _objective_section(objective)
    sections["output_dir"] = str(Path(output_dir).expanduser().absolute())
    model_name = str(model) if live_model is None else name_of_model(live_model)
    _set(sections, "model", "name_or_path", model_name)
    train_name = str(data) if train_rows is None else name_of_rows(train_rows)
    _set(sections, "data", "train", train_name)
    if eval_data is not None:
        name = str(eval_data) if eval_rows is None else name_of_rows(eval_rows)
        _set(sections, "data", "eval", name)
    recipe = _recipe(sections)

    reward = _reward(rewards)
    live_judge = _judge(judge)
    notes = [
        f"{kind}: {name_of_function(function)}"
        for kind, functions in (("reward", _as_list(rewards)), ("judge", _as_list(judge)))
        for function in functions
    ]
    task = LiveTask.of(
        model=live_model,
        tokenizer=tokenizer,
        train_rows=train_rows,
        eval_rows=eval_rows,
        reward=reward,
        judge=live_judge,
        embedded=resolve_task(recipe),
    )
    job = run_with_task(
        recipe, objective, task, resume=resume, safe=safe, notes=notes, identity={"python": notes}
    )
    return TrainedModel(
        job.pair.base.model if live_model is None else live_model,
        job.pair.tokenizer if tokenizer is None else tokenizer,
        _frame(RunFolder(recipe.output_dir).metrics_file),
        Path(recipe.output_dir),
    )


def _sections(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Section -> fields, from keywords that name a section or a field of one."""
    models = {name: Recipe.model_fields[name].annotation for name in SECTIONS}
    owners: dict[str, list[str]] = {}
    for section, model in models.items():
        assert isinstance(model, type)
        assert issubclass(model, Section)
        for field in model.model_fields:
            owners.setdefault(field, []).append(section)

    sections: dict[str, Any] = {}
    for name, value in settings.items():
        if name in NAMED_SECTIONS and name in Recipe.model_fields:
            whole = dict(value) if isinstance(value, Mapping) else value
            sections[name] = {**sections.get(name, {}), **whole} if name in SECTIONS else whole
            continue
        where = owners.get(name, [])
        if len(where) > 1:
            examples = " or ".join(f"{section}={{{name!r}: ...}}" for section in where)
            raise ConfigError(f"{name} is a field of {' and '.join(where)}; write {examples}")
        if not where:
            hint = nearest(name, [*owners, *NAMED_SECTIONS])
            raise ConfigError(
                f"train has no argument `{name}`.{hint} Fields of {', '.join(SECTIONS)} may be given "
                "by name"
            )
        sections.setdefault(where[0], {})[name] = value
    return sections


def _set(sections: dict[str, Any], section: str, field: str, value: str) -> None:
    given = sections.setdefault(section, {})
    if field in given:
        raise ConfigError(
            f"{section}.{field} is given twice; leave it out of the {section} section"
        )
    given[field] = value


def _recipe(sections: Mapping[str, Any]) -> Recipe:
    origin = Origin("alignkit.train")
    recipe = validated(Recipe, sections, origin)
    if recipe.train.steps is None and recipe.train.epochs is None:
        raise ConfigError("alignkit.train: steps and epochs are both None; give one")
    recipe._origin = origin
    return recipe


def _objective_section(objective: "Objective") -> dict[str, Any] | list[dict[str, Any]]:
    """How a recipe writes an objective: by its registered name, else by where its class is."""
    from alignkit.objectives import OBJECTIVES, locate
    from alignkit.objectives.base import Objective, Weighted

    if not isinstance(objective, Objective):
        raise ConfigError(
            f"objective is a {type(objective).__name__}; give an objective such as "
            "alignkit.DPO(beta=0.1)"
        )
    if isinstance(objective, Weighted):
        parts = [(_objective_section(part), weight) for part, weight in objective.parts]
        return [
            {**section, "weight": weight} for section, weight in parts if isinstance(section, dict)
        ]

    cls = type(objective)
    fields = objective.model_dump(mode="json")
    for name in OBJECTIVES:
        module, class_name, _ = locate(name)
        if (module, class_name) == (cls.__module__, cls.__name__):
            return {"name": name, **fields}
    return {"import": f"{cls.__module__}:{cls.__qualname__}", **fields}


def _as_list(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, Sequence) else [given]


def _reward(rewards: Any) -> Callable[..., Any] | None:
    """One function, or a list of them, as one reward."""
    functions = _as_list(rewards)
    if not functions:
        return None

    from alignkit.rewards.combine import Part, Reward
    from alignkit.rewards.functions import FunctionReward

    parts = []
    for number, function in enumerate(functions):
        if not callable(function):
            raise ConfigError(
                f"rewards: entry {number} is a {type(function).__name__}; give functions "
                "f(prompts, completions, **columns) -> list of numbers"
            )
        name = getattr(function, "__name__", type(function).__name__)
        parts.append(Part(name, FunctionReward(name, function)))
    return Reward(parts)


def _judge(judge: Any) -> Callable[..., Any] | None:
    """A judge's function, asked in both orders."""
    if judge is None:
        return None
    if not callable(judge):
        raise ConfigError(
            f"judge is a {type(judge).__name__}; give a function f(prompts, first, second) that "
            "returns the probabilities that the first wins"
        )

    from alignkit.judges.base import BothOrders

    return judge if isinstance(judge, BothOrders) else BothOrders(judge)


def _frame(file: Path) -> "pandas.DataFrame":
    import pandas

    from alignkit.files import read_jsonl

    return pandas.DataFrame(read_jsonl(file))
