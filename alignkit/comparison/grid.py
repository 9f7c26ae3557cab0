"""From the recipe's `compare` section to the runs of its grid, checked before anything is loaded.
Imports no torch.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from alignkit.config.compare import CompareConfig
from alignkit.config.objective import check_fields, check_part
from alignkit.config.recipe import Recipe, recipe_of
from alignkit.config.streams import refuse_streams
from alignkit.config.text import Keys
from alignkit.config.validation import nearest
from alignkit.errors import ConfigError
from alignkit.files import sha256_of_json

MOST_RUNS = 1000
OVERRIDABLE = ("model", "reference", "target", "data", "train", "rollout", "rewards", "judge")


@dataclass(frozen=True)
class Point:
    """One run of the grid."""

    name: str  # of its folder: label, swept fields, seed
    label: str  # its curve
    swept: Mapping[str, Any]  # its values of the fields in which the points of a curve differ
    seed: int
    recipe: Recipe
    # Hashes of the models, data and code that the recipe names, once they are known.
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides what is trained."""
        return self.recipe.model_dump(
            mode="json",
            exclude={
                "compare": True,
                "iterate": True,
                "trackers": True,
                "output_dir": True,
                "reference": {"store"},
            },
        )

    @property
    def hash(self) -> str:
        """A short hash of the settings: the same run has the same hash."""
        return sha256_of_json(self.settings)[:16]


def section_of(recipe: Recipe) -> CompareConfig:
    """The recipe's `compare` section. ConfigError where it has none."""
    if recipe.compare is None:
        raise ConfigError(
            f"{recipe.origin.name}: the recipe has no `compare` section; "
            "see `alignkit recipes show compare` for one that has"
        )
    return recipe.compare


def expand(recipe: Recipe) -> list[Point]:
    """Every run of the grid: curve by curve, then seed by seed, in the order written.

    ConfigError for an objective that does not exist or has other fields, sections that cannot
    differ between runs, and two runs of one name.
    """
    section = section_of(recipe)
    _check_overrides(recipe, section)
    _check_size(recipe, section)
    if section.match_kl:
        for label in section.grid:
            strength_field(recipe, label)
    points: dict[str, Point] = {}
    for label in section.grid:
        keys = ("compare", "grid", label)
        objective = _objective(section, label)
        check_part(objective, recipe.origin, keys)
        shared = _overridden(recipe, label, section.overrides.get(label, {}))
        refuse_streams(shared, "compare")

        # A list is a field that is swept: one run for each of its values.
        swept = {field: values for field, values in objective.items() if isinstance(values, list)}
        for field, values in swept.items():
            if not values:
                place = (*keys, field)
                raise ConfigError(
                    f"{recipe.origin.at(place)}: `{'.'.join(place)}` is an empty list"
                )

        for values, seed in product(product(*swept.values()), section.seeds):
            chosen = dict(zip(swept, values))
            check_fields({**objective, **chosen}, recipe.origin, keys)
            point = _point(recipe, shared, label, objective, chosen, seed)
            if point.name in points:
                raise ConfigError(
                    f"{recipe.origin.at(keys)}: two runs of the grid are `{point.name}`; "
                    "name the values once"
                )
            points[point.name] = point
    return list(points.values())


def _objective(section: CompareConfig, label: str) -> dict[str, Any]:
    """The fields of a label's objective, which the label names unless they do."""
    fields = section.grid[label]
    return fields if {"name", "import"} & set(fields) else {"name": label, **fields}


def strength_field(recipe: Recipe, label: str) -> str:
    """The field that `compare.match_kl` varies: the only one that the label sweeps.

    ConfigError where it sweeps none or several, or values that are no strengths.
    """
    keys = ("compare", "grid", label)
    swept = {
        name: values
        for name, values in section_of(recipe).grid[label].items()
        if isinstance(values, list)
    }
    if len(swept) != 1:
        given = f"has {len(swept)}: {', '.join(swept)}" if swept else "has none"
        raise ConfigError(
            f"{recipe.origin.at(keys)}: `compare.match_kl` varies the one field of a label that is "
            f"a list, and `{label}` {given}; write its strength as a list of the values to begin "
            "with, such as beta: [0.5]"
        )

    (name, values), *_ = swept.items()
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and 0 < value < math.inf):
            raise ConfigError(
                f"{recipe.origin.at((*keys, name))}: `compare.match_kl` searches for `{name}` of "
                f"`{label}` among positive numbers, {value!r} is none"
            )
    return name


def at_strength(recipe: Recipe, label: str, strength: float) -> list[Point]:
    """The runs of a label at one strength, one per seed."""
    section = section_of(recipe)
    shared = _overridden(recipe, label, section.overrides.get(label, {}))
    swept = {strength_field(recipe, label): strength}
    return [
        _point(recipe, shared, label, _objective(section, label), swept, seed)
        for seed in section.seeds
    ]


def _point(
    recipe: Recipe,
    shared: Recipe,
    label: str,
    objective: Mapping[str, Any],
    swept: Mapping[str, Any],
    seed: int,
) -> Point:
    """One run: the recipe `shared` by its curve with its own values of the swept fields and seed."""
    name = name_of(label, {**swept, "seed": seed})
    out = Path(recipe.output_dir)
    changes = {
        "objective": {**objective, **swept},
        "train": shared.train.model_copy(update={"seed": seed}),
        "compare": None,
        "iterate": None,
        "reference": shared.reference.model_copy(update={"store": str(out / "reference")}),
        "output_dir": str(out / "runs" / name),
    }
    return Point(name, label, swept, seed, shared.model_copy(update=changes))


def name_of(label: str, fields: Mapping[str, Any]) -> str:
    """The name of a file or folder for a label with some of its fields."""
    parts = [label, *(f"{field}={value}" for field, value in fields.items())]
    return re.sub(r"[^\w.=+-]", "_", "-".join(parts)).lstrip(".")


def _check_size(recipe: Recipe, section: CompareConfig) -> None:
    """ConfigError for more runs than a comparison can have, before any of them is made."""
    sizes = {
        label: prod(len(values) for values in fields.values() if isinstance(values, list))
        for label, fields in section.grid.items()
    }
    runs = sum(sizes.values()) * len(section.seeds)
    if runs > MOST_RUNS:
        largest = max(sizes, key=sizes.__getitem__)
        seeds = len(section.seeds)
        raise ConfigError(
            f"{recipe.origin.at(('compare', 'grid', largest))}: the grid has {runs:,} runs, at "
            f"most {MOST_RUNS:,} are allowed; `{largest}` has {sizes[largest]:,} combinations of "
            f"values, and there are {seeds} seeds; give fewer values, or several comparisons"
        )


def _check_overrides(recipe: Recipe, section: CompareConfig) -> None:
    for label, sections in section.overrides.items():
        keys: Keys = ("compare", "overrides", label)
        if label not in section.grid:
            hint = f"{nearest(label, section.grid)} It has: {', '.join(section.grid)}"
            raise ConfigError(
                f"{recipe.origin.at(keys)}: `{'.'.join(keys)}`: the grid has no `{label}`.{hint}"
            )

        for name in sections:
            if name not in OVERRIDABLE:
                place = (*keys, name)
                hint = f"{nearest(name, OVERRIDABLE)} Allowed: {', '.join(OVERRIDABLE)}"
                raise ConfigError(
                    f"{recipe.origin.at(place)}: `{'.'.join(place)}` cannot differ between the "
                    f"runs of a comparison.{hint}"
                )

        if "seed" in (sections.get("train") or {}):
            place = (*keys, "train", "seed")
            raise ConfigError(
                f"{recipe.origin.at(place)}: seeds are given by `compare.seeds`, for all alike"
            )


def _overridden(recipe: Recipe, label: str, sections: Mapping[str, Any]) -> Recipe:
    """The recipe with a label's sections laid over it. ConfigError names the place of the override
    that is wrong.
    """
    if not sections:
        return recipe
    whole = _merged(recipe.model_dump(mode="json"), sections)
    changed = recipe_of(whole, recipe.origin, ("compare", "overrides", label))
    return recipe.model_copy(update={name: getattr(changed, name) for name in sections})


def _merged(under: Any, over: Any) -> Any:
    if isinstance(under, Mapping) and isinstance(over, Mapping):
        return {**under, **{key: _merged(under.get(key), value) for key, value in over.items()}}
    return over
