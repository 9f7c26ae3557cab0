"""The recipe's `objective` section, and the objective that it describes.

The section is a mapping with `name` or `import`, or a list of such mappings with weights. Reading
it imports no torch, and neither does checking its fields one by one; `build_objective` does, because
the classes of objectives need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, PositiveFloat

from alignkit.config.objective_fields import fields_of
from alignkit.config.other_names import objective_here
from alignkit.config.plugins import load_object
from alignkit.config.text import Keys, Origin
from alignkit.config.validation import nearest, validated
from alignkit.errors import ConfigError
from alignkit.objectives import OBJECTIVES, locate

if TYPE_CHECKING:
    from alignkit.objectives.base import Objective

Part = dict[str, Any]  # `name` or `import` beside the hyper-parameters; in a list also `weight`
DEFAULT_OBJECTIVE: Part = {"name": "dpo", "beta": 0.1}


class Weight(BaseModel):
    """The `weight` of one part of a weighted list."""

    weight: PositiveFloat = 1.0


def build_objective(
    section: Part | list[Part],
    origin: Origin | None = None,
    *,
    safe: bool = False,
    keys: Keys = ("objective",),
) -> "Objective":
    """The objective of a recipe's section; a list gives the weighted sum. Imports torch, loads no
    model. `keys` lead to the section in the recipe.

    Raises ConfigError for an unknown name or field, for a value that the objective refuses, and for
    `import:` when `safe`.
    """
    from alignkit.objectives.base import Weighted

    origin = origin or Origin()
    if isinstance(section, dict):
        return _build_part(section, origin, keys, safe)

    parts = []
    for part_keys, part in parts_of(section, keys):
        rest, weight = _weighed(part, origin, part_keys)
        parts.append((_build_part(rest, origin, part_keys, safe), weight))

    weighted = Weighted(parts=parts)
    weighted.plan  # noqa: B018  parts that do not fit together are refused here
    return weighted


def parts_of(section: Part | list[Part], keys: Keys = ("objective",)) -> list[tuple[Keys, Part]]:
    """The parts of an `objective` section, each with the keys that lead to it in the recipe."""
    if isinstance(section, dict):
        return [(keys, section)]
    return [((*keys, str(index)), part) for index, part in enumerate(section)]


def check_section(section: Part | list[Part], origin: Origin, keys: Keys = ("objective",)) -> None:
    """Refuse, without torch, an `objective` section of which a part or one of its fields by itself
    is wrong. ConfigError.

    `build_objective` alone knows what needs the classes: rules between the fields of an objective,
    names of divergences, the fields of an `import`, and parts that do not fit together.
    """
    for part_keys, part in parts_of(section, keys):
        check_part(part, origin, part_keys)
        rest = part if isinstance(section, dict) else _weighed(part, origin, part_keys)[0]
        check_fields(rest, origin, part_keys)


def check_fields(part: Part, origin: Origin, keys: Keys) -> None:
    """Refuse fields that the named objective does not have, and values that they cannot have, each
    by itself; without torch. ConfigError.
    """
    model = fields_of(part["name"]) if "name" in part else None
    if model is not None:
        validated(model, _fields(part), origin, keys)


def check_part(part: Part, origin: Origin, keys: Keys) -> None:
    """Refuse a part that does not say what it is by exactly one of `name` (a registered objective)
    and `import`. ConfigError.
    """
    where = ".".join(keys)
    at = origin.at((*keys, "name"))

    given = [key for key in ("name", "import") if key in part]
    if len(given) != 1:
        raise ConfigError(
            f"{at}: `{where}` should have one of `name` and `import`; "
            f"it has {' and '.join(given) or 'neither'}"
        )

    value = part[given[0]]
    if not isinstance(value, str):
        raise ConfigError(f"{at}: `{where}.{given[0]}` is {value!r}; it should be text")
    if given == ["name"] and value not in OBJECTIVES:
        raise ConfigError(
            f"{at}: there is no objective `{value}`.{objective_here(value) or nearest(value, OBJECTIVES)} "
            f"Allowed: {', '.join(OBJECTIVES)}"
        )


def _build_part(part: Part, origin: Origin, keys: Keys, safe: bool) -> "Objective":
    check_part(part, origin, keys)
    if "import" in part:
        cls = _imported_class(part["import"], origin, keys, safe)
    else:
        module, name, _ = locate(part["name"])
        cls = getattr(import_module(module), name)

    return validated(cls, _fields(part), origin, keys)


def _fields(part: Part) -> dict[str, Any]:
    """The hyper-parameters of a part."""
    return {name: value for name, value in part.items() if name not in ("name", "import")}


def _weighed(part: Part, origin: Origin, keys: Keys) -> tuple[Part, float]:
    """A part of a weighted list without its weight, and the weight."""
    given = {"weight": part["weight"]} if "weight" in part else {}
    rest = {name: value for name, value in part.items() if name != "weight"}
    return rest, validated(Weight, given, origin, keys).weight


def _imported_class(spec: str, origin: Origin, keys: Keys, safe: bool) -> "type[Objective]":
    """The user's own objective class that `import: module:Name` or `file.py:Name` names."""
    from alignkit.objectives.base import Objective

    what = f"{origin.at((*keys, 'import'))}: {'.'.join(keys)}.import"
    cls = load_object(spec, what=what, safe=safe)
    if not (isinstance(cls, type) and issubclass(cls, Objective)):
        raise ConfigError(f"{what}: {spec} is not a subclass of alignkit.objectives.base.Objective")
    return cls
