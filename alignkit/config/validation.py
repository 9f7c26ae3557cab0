"""From plain data to sections. Every fault is explained: where it was written, what was given, what
is allowed, and the nearest valid name.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from alignkit.config.other_names import called_here, said_here
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
        # A union gives one fault per member; together they are one faulty field.
        faults: dict[Keys, list[ErrorDetails]] = {}
        for fault in error.errors(include_url=False):
            faults.setdefault(_place(fault, data), []).append(fault)

    lines = [
        f"{origin.at((*keys, *place))}: {_describe(model, data, keys, place, faults_there)}"
        for place, faults_there in faults.items()
    ]
    raise ConfigError("\n".join(lines))


def nearest(given: str, allowed: Iterable[str]) -> str:
    """ " Did you mean `x`?", or nothing where no allowed name is close."""
    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean `{close[0]}`?" if close else ""


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
    last = len(fault["loc"]) - 1
    for number, part in enumerate(fault["loc"]):
        inside = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if inside:
            data = data[part]
        is_missing = fault["type"] == "missing" and number == last
        if inside or (is_missing and isinstance(data, dict)):
            keys.append(str(part))
    return tuple(keys)


def _describe(
    model: type[BaseModel],
    data: Mapping[str, Any],
    keys: Keys,
    place: Keys,
    faults: list[ErrorDetails],
) -> str:
    """One faulty field as a sentence: what was given and what it should be."""
    name = ".".join((*keys, *place)) or "recipe"
    fault = faults[0]
    if fault["type"] == "extra_forbidden":
        return _unknown(model, data, keys, place)
    if fault["type"] == "missing" and not isinstance(fault["input"], list):
        return f"`{name}` is missing"
    if fault["type"] == "value_error":
        return f"`{name}`: {fault['msg'].removeprefix('Value error, ')}"

    given = json.dumps(fault["input"], ensure_ascii=False)
    if len(given) > 60:
        given = given[:57] + "..."
    wanted = dict.fromkeys(
        _WORDS.get(f["type"], f["msg"].removeprefix("Input should be ")) for f in faults
    )

    # pydantic lists a Literal's values in quotes, as in "'cosine', 'linear' or 'constant'"
    expected = [f.get("ctx", {}).get("expected", "") for f in faults]
    allowed = [word for text in expected for word in re.findall(r"'([^']*)'", text)]
    word = fault["input"]
    hint = said_here(word) or (nearest(word, allowed) if isinstance(word, str) else "")
    if fault["type"] == "list_type" and isinstance(word, str):
        hint = f" Write [{word}]." if word.isidentifier() else f' Write ["{word}"].'
    return f"`{name}` is {given}; it should be {' or '.join(wanted)}.{hint}"


def _unknown(model: type[BaseModel], data: Mapping[str, Any], keys: Keys, place: Keys) -> str:
    """The sentence for a field or section that does not exist."""
    fields = [field for inner in _models_at(model, place[:-1]) for field in inner.model_fields]
    given = place[-1]
    hint = called_here(given) or nearest(given, fields)
    if ":" in given:
        hint = " YAML needs a space after a colon: {name: value}."
    if not hint and not keys:
        hint = _nearest_elsewhere(model, data, place)

    parent = ".".join((*keys, *place[:-1]))
    where = f"a field of `{parent}`" if parent else "a section of a recipe"
    name = ".".join((*keys, *place))
    return f"`{name}` is not {where}.{hint} Allowed: {', '.join(fields) or 'none'}"


def _nearest_elsewhere(model: type[BaseModel], data: Mapping[str, Any], place: Keys) -> str:
    """A hint for a field of another section, or one written a
    level too high: `seed` should be `train.seed`.
    """
    known = field_names(model)
    for section, value in data.items():  # the objective's fields are in no model, but in the recipe
        if isinstance(value, dict):
            known += [f"{section}.{field}" for field in value]

    # Of several fields of one name the one nearest to the top is meant.
    known.sort(key=lambda name: -name.count("."))
    by_last_key = {name.rpartition(".")[2]: name for name in known if name != ".".join(place)}
    close = difflib.get_close_matches(place[-1], by_last_key, n=1, cutoff=0.8)
    return f" Did you mean `{by_last_key[close[0]]}`?" if close else ""


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field's annotation allows, such as `AdapterConfig | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


def _models_at(model: type[BaseModel], keys: Keys) -> list[type[BaseModel]]:
    """The models that may stand at `keys`; list indices, and keys of a mapping of models, stay on
    the same model.
    """
    models = [model]
    for key in keys:
        annotations = [m.model_fields[key].annotation for m in models if key in m.model_fields]
        if annotations:
            models = [inner for annotation in annotations for inner in _models_in(annotation)]
    return models
