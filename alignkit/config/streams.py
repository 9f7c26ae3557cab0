"""The objectives of a recipe's streams, or its one objective."""

from typing import TYPE_CHECKING

from alignkit.config.objective import build_objective
from alignkit.config.recipe import Recipe
from alignkit.config.row_sources import TrainSource
from alignkit.errors import ConfigError

if TYPE_CHECKING:
    from alignkit.objectives.base import Objective


def objective_of(recipe: Recipe, *, safe: bool = False) -> "Objective":
    """What a run of the recipe learns: its objective, or `Streams` of those of its sources. Imports
    torch. ConfigError as of `build_objective`, and for objectives that cannot share a model.
    """
    sections = recipe.objectives()
    if not recipe.data.has_streams:
        return build_objective(recipe.objective, recipe.origin, safe=safe)

    from alignkit.objectives.streams import Stream, Streams

    sources = recipe.data.sources()
    whole = sum(source.share or 0.0 for source in sources)
    streams = []
    for source, (keys, section) in zip(sources, sections, strict=True):
        objective = build_objective(section, recipe.origin, safe=safe, keys=keys)
        streams.append(Stream(source.stream_name, objective, share_of(source) / whole))

    together = Streams(streams=streams)
    _ = together.plan  # streams that cannot share a model are refused here
    return together


def refuse_streams(recipe: Recipe, command: str) -> None:
    """ConfigError where the recipe has streams: `command` trains runs of one objective each."""
    if recipe.data.has_streams:
        raise ConfigError(
            f"{recipe.origin.at(('data', 'train'))}: `data.train` has sources with objectives of their "
            f"own, and `alignkit {command}` trains runs of one objective; use `alignkit train`"
        )


def share_of(source: TrainSource) -> float:
    """The share of a stream, relative to the others'."""
    assert source.share is not None  # streams have shares
    return source.share
