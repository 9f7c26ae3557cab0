"""`alignkit.train`: a run from Python, with live objects.

It takes the same path as a recipe. One is made from its arguments and stands in the run folder as
`recipe.yaml`; objects that have no name there are called `python:...` with a hash of their content.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.config.other_names import argument_here
from alignkit.config.recipe import Recipe, recipe_of
from alignkit.config.row_sources import TrainSource
from alignkit.config.section import Section
from alignkit.config.text import Origin
from alignkit.config.validation import nearest
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
    from alignkit.training.job import Job

# Sections whose fields may be given by keyword, without their section's name.
SECTIONS = ("train", "rollout", "data", "model", "reference")
NAMED_SECTIONS = (*SECTIONS, "target", "teacher", "trackers", "hub")
SOURCE_FIELDS = set(TrainSource.model_fields)


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
    compute_metrics: Any = None,
    resume: str | None = None,
    safe: bool = False,
    **settings: Any,
) -> TrainedModel:
    """Train `model` with `objective` and return it with its metrics and its run folder.

    - `model`: a transformers causal language model or a peft model (trained in place; needs its
      `tokenizer`), or a folder, a hub name or "task"
    - `data`, `eval_data`: a list of rows (dicts), a `datasets.Dataset`, a pandas frame, or what
      `data.train` takes in a recipe; a mixture is a list of `{"source": ..., "share": ...}`, and
      several evaluation sets are a mapping of names, whose sources may be any of these
    - `rewards`: a function `f(prompts, completions, **columns) -> list`, or several, which are added
    - `judge`: a function `f(prompts, first, second)` that gives the probability that the first wins
    - `compute_metrics`: a function of transformers' `EvalPrediction` that gives {name: number}
    - any field of the sections train, rollout, data, model and reference by keyword (`steps=300,
      learning_rate=5e-6`), or a whole section as a mapping (`train={"steps": 300}`); a field that
      several sections have has to stand in its section
    - `resume`: None, "auto" or a checkpoint folder, as on the command line

    Raises the errors of the command line, ConfigError for arguments and so on.

    >>> run = train(DPO(beta=0.1), model=model, tokenizer=tokenizer, data=pairs,
    ...             output_dir="runs/mine", steps=300, learning_rate=5e-6)  # doctest: +SKIP
    """
    from alignkit.runs.launch import resolve_task, run_with_task

    live = _live_model(model, tokenizer)
    sections = _sections(settings)
    named_rows = _set_data(sections, data, eval_data)
    sections["objective"] = _objective_section(objective)
    sections["output_dir"] = str(Path(output_dir).expanduser().absolute())
    _set(sections, "model", "name_or_path", name_of_model(model) if live else str(model))
    metrics_function = _set_metrics_function(sections, compute_metrics)
    recipe = recipe_of(sections, Origin("alignkit.train"))

    task = LiveTask.of(
        **live,
        named_rows=named_rows,
        reward=_reward(rewards),
        judge=_judge(judge),
        embedded=resolve_task(recipe),
        compute_metrics=metrics_function,
    )
    notes = _names("reward", rewards) + _names("judge", judge)
    job = run_with_task(
        recipe, objective, task, resume=resume, safe=safe, notes=notes, identity={"python": notes}
    )
    return _finished(job, live, tokenizer)


def _finished(job: "Job", live: Mapping[str, Any], tokenizer: Any) -> TrainedModel:
    """A run that has ended, with the objects that it was given."""
    model = live.get("model", job.pair.base.model)
    tokenizer = job.pair.tokenizer if tokenizer is None else tokenizer
    return TrainedModel(model, tokenizer, _frame(job.run.metrics_file), job.run.path)


def _live_model(model: Any, tokenizer: Any) -> dict[str, Any]:
    """A model that was given as an object, with its tokenizer; nothing where it was named."""
    if isinstance(model, str | Path):
        return {}
    if tokenizer is None:
        raise ConfigError("tokenizer: a model that is given as an object needs its tokenizer")
    return {"model": model, "tokenizer": tokenizer}


def _set_metrics_function(sections: dict[str, Any], given: Any) -> Callable[..., Any] | None:
    """Fill in `train.compute_metrics`; returns the function where one was given as an object."""
    if given is None:
        return None
    is_named = isinstance(given, str)
    _set(sections, "train", "compute_metrics", given if is_named else name_of_function(given))
    return None if is_named else given  # type: ignore[no-any-return]


def _set_data(sections: dict[str, Any], data: Any, eval_data: Any) -> dict[str, Any]:
    """Fill in the data section; returns the rows that were given as objects, by their names there."""
    named_rows: dict[str, Any] = {}
    _set(sections, "data", "train", _training_data(data, named_rows))
    if eval_data is not None:
        _set(sections, "data", "eval", _held_out_data(eval_data, named_rows))
    return named_rows


def _training_data(given: Any, named_rows: dict[str, Any]) -> str | list[dict[str, Any]]:
    """What `data.train` says: the name of one source, or a mixture of several."""
    if not _is_mixture(given):
        return _data(given, "data", named_rows)
    if any("objective" in entry for entry in given):
        raise ConfigError(
            "data: a source has an objective of its own, and `train` is given one for all; write a "
            "recipe and run it with alignkit.run_recipe"
        )
    return [
        {**entry, "source": _data(entry["source"], f"data.{place}.source", named_rows)}
        for place, entry in enumerate(given)
    ]


def _held_out_data(given: Any, named_rows: dict[str, Any]) -> str | dict[str, Any]:
    """What `data.eval` says: the name of one source, or of several by the names of their sets."""
    if not isinstance(given, Mapping):
        return _data(given, "eval_data", named_rows)

    def named(name: str, part: Any) -> Any:
        if isinstance(part, Mapping) and "source" in part:
            return {**part, "source": _data(part["source"], f"eval_data.{name}.source", named_rows)}
        return _data(part, f"eval_data.{name}", named_rows)

    return {name: named(name, part) for name, part in given.items()}


def _is_mixture(given: Any) -> bool:
    """Whether a list holds sources instead of rows: mappings with `source`, and none of the columns
    that rows have.
    """
    return (
        isinstance(given, list | tuple)
        and bool(given)
        and all(
            isinstance(entry, Mapping) and "source" in entry and entry.keys() <= SOURCE_FIELDS
            for entry in given
        )
    )


def _data(given: Any, argument: str, named_rows: dict[str, Any]) -> str:
    """What a recipe calls a source. Rows that are given as an object are named by their hash, and
    `named_rows` has them under that name.
    """
    if isinstance(given, str | Path):
        return str(given)
    rows = rows_of(given, argument)
    name = name_of_rows(rows)
    named_rows[name] = rows
    return name


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
            hint = argument_here(name) or nearest(name, [*owners, *NAMED_SECTIONS])
            raise ConfigError(
                f"train has no argument `{name}`.{hint} Fields of {', '.join(SECTIONS)} may be given "
                "by name"
            )
        sections.setdefault(where[0], {})[name] = value
    return sections


def _set(sections: dict[str, Any], section: str, field: str, value: Any) -> None:
    given = sections.setdefault(section, {})
    if field in given:
        raise ConfigError(
            f"{section}.{field} is given twice; leave it out of the {section} section"
        )
    given[field] = value


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


def _names(kind: str, functions: Any) -> list[str]:
    return [f"{kind}: {name_of_function(function)}" for function in _as_list(functions)]


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
