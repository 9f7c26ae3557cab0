"""pydantic's verdict on a recipe, in words: where it was written, what was given, what is allowed,
the nearest valid name.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from alignkit.config.text import Keys, Origin
from alignkit.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)
_WORDS = {  # pydantic's error types whose own words speak of JSON or Python
    "model_type": "a mapping of fields",
    "dict_type": "a mapping of fields",
    "list_type": "a list",
    "missing": "a list with more values",
    "string_type": "text (quote it)",
    "string_too_short": "not empty",
    "too_short": "not empty",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
}


def validated(
    model: type[Model], data: Mapping[str, Any], origin: Origin, keys: Keys = ()
) -> Model:
    """`data` as `model`, nothing converted (text is no number, 1 is no flag). `keys` lead to `data`
    in the recipe.

    Raises ConfigError with one line per faulty field.
    """
    try:
        # JSON's strictness: a list may become a tuple
        return model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        faults: dict[Keys, list[ErrorDetails]] = {}
        for fault in error.errors(include_url=False):
            faults.setdefault(_place(fault, data), []).append(fault)
    lines = [
        f"{origin.at((*keys, *place))}: {_describe(model, data, keys, place, found)}"
        for place, found in faults.items()
    ]
    raise ConfigError("\n".join(lines))


def nearest(given: str, allowed: Iterable[str]) -> str:
    """ " Did you mean `x`?", or nothing where no allowed name is close."""
    found = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean `{found[0]}`?" if found else ""


def field_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of every field of `model` and of the models inside it."""
    names = []
    for name, info in model.model_fields.items():
        names.append(prefix + name)
        for inner in _models_in(info.annotation):
            names += field_names(inner, f"{prefix}{name}.")
    return names


def _place(fault: ErrorDetails, data: Any) -> Keys:
    """The fault's location without pydantic's own marks (which member of a union failed)."""
    keys: list[str] = []
    for part in fault["loc"]:
        inside = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if inside:
            data = data[part]
        if inside or (fault["type"] == "missing" and isinstance(data, dict)):
            keys.append(str(part))
    return tuple(keys)


def _describe(
    model: type[BaseModel],
    data: Mapping[str, Any],
    keys: Keys,
    place: Keys,
    faults: list[ErrorDetails],
) -> str:
    name = ".".join((*keys, *place)) or "recipe"
    fault = faults[0]
    if fault["type"] == "extra_forbidden":
        return _unknown(model, data, keys, place)
    if fault["type"] == "missing" and not isinstance(fault["input"], list):
        return f"`{name}` is missing"
    if fault["type"] == "value_error":
        return f"`{name}`: {fault['msg'].removeprefix('Value error, ')}"
    given = json.dumps(fault["input"], ensure_ascii=False)
    given = given if len(given) <= 60 else given[:57] + "..."
    wanted = dict.fromkeys(
        _WORDS.get(f["type"], f["msg"].removeprefix("Input should be ")) for f in faults
    )
    allowed = [
        word
        for f in faults
        for word in re.findall(r"'([^']*)'", f.get("ctx", {}).get("expected", ""))
    ]
    hint = nearest(fault["input"], allowed) if isinstance(fault["input"], str) else ""
    return f"`{name}` is {given}; it should be {' or '.join(wanted)}.{hint}"


def _unknown(model: type[BaseModel], data: Mapping[str, Any], keys: Keys, place: Keys) -> str:
    inner = _models_at(model, place[:-1])
    fields = [field for found in inner for field in found.model_fields]
    parent = ".".join((*keys, *place[:-1]))
    given = place[-1]
    hint = nearest(given, fields)
    if not hint and not keys:  # a field of another section, or written one level too high
        known = field_names(model) + [
            f"{name}.{key}"
            for name, value in data.items()
            if isinstance(value, dict)
            for key in value
        ]
        elsewhere = {name.rpartition(".")[2]: name for name in known if name != ".".join(place)}
        found = difflib.get_close_matches(given, elsewhere, n=1, cutoff=0.8)
        hint = f" Did you mean `{elsewhere[found[0]]}`?" if found else ""
    where = f"a field of `{parent}`" if parent else "a section of a recipe"
    return f"`{'.'.join((*keys, *place))}` is not {where}.{hint} Allowed: {', '.join(fields) or 'none'}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _models_in(inner)]


def _models_at(model: type[BaseModel], keys: Keys) -> list[type[BaseModel]]:
    """The models that may stand at `keys`; list indices stay on the same model."""
    models = [model]
    for key in keys:
        if not key.isdecimal():
            models = [
                m
                for found in models
                if key in found.model_fields
                for m in _models_in(found.model_fields[key].annotation)
            ]
    return models
