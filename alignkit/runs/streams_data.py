"""The data of a run with streams: one source of all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from alignkit.batches import Bundle
from alignkit.config.streams import share_of
from alignkit.errors import ConfigError, DataError
from alignkit.objectives.streams import Reweigh, Streams
from alignkit.runs.context import RunContext
from alignkit.runs.job_data import JobData
from alignkit.runs.streams import contexts_of, held_out_metric, recipes_of
from alignkit.sources.streams import StreamSource
from alignkit.training.held_out_sets import measured_on
from alignkit.training.reduction import Metrics

Load = Callable[[RunContext], JobData]


def streams_data(context: RunContext, load: Load) -> JobData:
    """The data of all streams as one source. `load` reads those of one."""
    assert isinstance(context.objective, Streams)
    streams = context.objective.streams
    parts = [
        _data_of(stream.name, own, load)
        for stream, own in zip(streams, contexts_of(context), strict=True)
    ]
    named = {stream.name: part for stream, part in zip(streams, parts)}

    section = context.recipe.data.reweigh
    reweigh = None if section is None else Reweigh(section.window, section.temperature)
    formats = {part.format for part in parts}
    return JobData(
        source=StreamSource(streams, [part.source for part in parts], reweigh),
        rows=sum(part.rows for part in parts),
        format=formats.pop() if len(formats) == 1 else "auto",
        identity={"streams": _identity(context, named)},
        notes=[f"{name}: {line}" for name, part in named.items() for line in part.notes],
        samples=parts[0].samples,
        evaluation=_evaluation(named),
        measure=_measure(named),
        observe=_observe(parts),
    )


def _data_of(name: str, context: RunContext, load: Load) -> JobData:
    """The data of one stream. Errors say which one it is."""
    rows = context.recipe.train.batch_size
    if rows < context.processes:
        raise ConfigError(
            f"data.train: stream `{name}` has {rows} rows in each step, fewer than the "
            f"{context.processes} processes; raise train.batch_size or its share"
        )
    watched = f"eval_{name}_{held_out_metric(context)}"
    train = context.recipe.train.model_copy(update={"metric": watched})
    recipe = context.recipe.model_copy(update={"train": train})
    try:
        return load(replace(context, recipe=recipe, stream=name))
    except DataError as error:
        raise DataError(f"stream `{name}`: {error}") from error


def _identity(context: RunContext, named: Mapping[str, JobData]) -> list[dict[str, Any]]:
    """What a checkpoint must match of each stream."""
    recipes = recipes_of(context.recipe)
    return [
        {
            "name": name,
            "objective": recipe.objective,
            "share": share_of(source),
            **part.identity,
        }
        for (name, part), recipe, source in zip(
            named.items(), recipes, context.recipe.data.sources(), strict=True
        )
    ]


def _evaluation(named: Mapping[str, JobData]) -> dict[str, Sequence[Bundle]] | None:
    """This rank's held-out bundles of the streams that have some."""
    sets = {
        name: bundles
        for name, part in named.items()
        for bundles in (part.evaluation or {}).values()
    }
    return sets or None


def _measure(named: Mapping[str, JobData]) -> Callable[[], Metrics] | None:
    return measured_on({name: p.measure for name, p in named.items() if p.measure is not None})


def _observe(parts: Sequence[JobData]) -> Callable[[Metrics], None] | None:
    """Tells every stream that asks for it of an evaluation."""
    observers = [part.observe for part in parts if part.observe is not None]

    def observe(metrics: Metrics) -> None:
        for observer in observers:
            observer(metrics)

    return observe if observers else None
