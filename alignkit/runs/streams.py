"""The streams of a run: each is a recipe of its own as far as its data and its objective go, and all
of them train one model.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from alignkit.config.objective import DEFAULT_OBJECTIVE
from alignkit.config.recipe import Recipe
from alignkit.config.row_sources import rows_by_share
from alignkit.config.streams import share_of
from alignkit.errors import ConfigError
from alignkit.runs.checks import unused_sections

if TYPE_CHECKING:
    from alignkit.objectives.base import Objective
    from alignkit.runs.context import RunContext

SEED_STEP = 15_485_863  # between the seeds of two streams, which see different noise


def recipes_of(recipe: Recipe) -> list[Recipe]:
    """The recipe itself, or those of its streams: what each would be if it trained alone."""
    data = recipe.data
    if not data.has_streams:
        return [recipe]

    streams = data.sources()
    rows = rows_by_share([share_of(stream) for stream in streams], recipe.train.batch_size)
    recipes = []
    for number, (stream, count) in enumerate(zip(streams, rows)):
        source = stream.model_copy(
            update={"objective": None, "name": None, "eval": None, "share": None}
        )
        own_data = data.model_copy(update={"train": [source], "eval": stream.eval, "reweigh": None})
        own_train = recipe.train.model_copy(
            update={"batch_size": count, "seed": recipe.train.seed + number * SEED_STEP}
        )
        sections = {"data": own_data, "train": own_train, "objective": stream.objective}
        own = recipe.model_copy(update=sections)
        own._origin = recipe.origin
        recipes.append(own)
    return recipes


def parts_of_run(recipe: Recipe, objective: "Objective") -> "list[tuple[Recipe, Objective]]":
    """The recipe with its objective, or those of the streams."""
    from alignkit.objectives.streams import Streams

    if not isinstance(objective, Streams):
        return [(recipe, objective)]
    objectives = [stream.objective for stream in objective.streams]
    return list(zip(recipes_of(recipe), objectives, strict=True))


def contexts_of(context: "RunContext") -> "list[RunContext]":
    """The context, or those of its streams, with one pair of models."""
    return [
        replace(context, recipe=recipe, objective=objective)
        for recipe, objective in parts_of_run(context.recipe, context.objective)
    ]


def check_streams(recipe: Recipe, objective: "Objective") -> None:
    """Check that the streams can share what samples for them. ConfigError."""
    from alignkit.batches import FAMILIES

    parts = parts_of_run(recipe, objective)
    if len(parts) < 2:
        return
    rollout = recipe.rollout
    sampled = [FAMILIES[own.plan.data].sampled for _, own in parts]
    reasons = {
        ("rollout", "ahead"): rollout.ahead > 0 and any(sampled),
        ("rollout", "engine"): rollout.engine == "vllm" and sum(sampled) > 1,
        ("rollout", "temperature"): (
            rollout.temperature != 1 and any(sampled) and not all(sampled)
        ),
    }
    words = {
        "ahead": "sampling while training does not work with streams: leave it out",
        "engine": "two streams would replace each other's weights in the server; use hf",
        "temperature": "rows of a file come from no temperature; leave it at 1",
    }
    for (section, field), holds in reasons.items():
        if holds:
            place = recipe.origin.at((section, field))
            raise ConfigError(f"{place}: `{section}.{field}`: {words[field]}")


def unused_by_all(recipe: Recipe, objective: "Objective") -> list[str]:
    """`unused_sections` of the run: one stream may use what another does not."""
    listed = [unused_sections(*part) for part in parts_of_run(recipe, objective)]
    notes = [note for note in listed[0] if all(note in others for others in listed)]
    if recipe.data.has_streams and recipe.objective != DEFAULT_OBJECTIVE:
        notes.append(
            "`objective` is set in the recipe, but every source has an objective of its own"
        )
    return notes


def held_out_metric(context: "RunContext") -> str:
    """What is measured of held-out rows: the reward of what is sampled, else the loss."""
    from alignkit.batches import FAMILIES

    return "reward" if FAMILIES[context.plan.data].sampled else "loss"
