"""The fields of the registered objectives, known without their classes, which need torch.

`alignkit/objectives/fields.json` says what each field may be, and which rows are learned from. `python docs/make_objectives.py`
writes it from the classes, and a test keeps the two equal.
"""

import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, create_model

from alignkit import objectives

TABLE = Path(objectives.__file__).with_name("fields.json")

# What JSON Schema calls a limit -> what pydantic calls it.
LIMITS = {"minimum": "ge", "maximum": "le", "exclusiveMinimum": "gt", "exclusiveMaximum": "lt"}
NAMES = "names"  # what a text may be, as long as no code registers more
REFUSED = "refused"  # what it may not be, for a reason that the class gives
TYPES = {"number": float, "integer": int, "boolean": bool, "string": str, "null": None}


class _Fields(BaseModel):
    """As `objectives.base.Objective` is configured."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


@cache
def fields_of(name: str) -> type[BaseModel] | None:
    """A model that accepts what every field of the registered objective `name` accepts by itself;
    None where the table was not written anew since. Rules between several fields are its class's.
    """
    entry = _table().get(name)
    if entry is None:
        return None
    schemas = entry["fields"]
    fields: dict[str, Any] = {
        field: (annotation(schema), None) for field, schema in schemas.items()
    }
    return create_model(name, __base__=_Fields, **fields)


def family_of(name: str) -> str | None:
    """The data family of the registered objective `name`; None where its settings decide, and where
    the table does not know it.
    """
    family: str | None = _table().get(name, {}).get("family")
    return family


def known_names(name: str) -> dict[str, tuple[list[str], list[str]]]:
    """Field -> the names that it may have, and those that are refused with a reason; for fields of
    the registered objective `name` for which code can register more.
    """
    fields = _table().get(name, {}).get("fields", {})
    return {
        field: (schema[NAMES], schema[REFUSED])
        for field, schema in fields.items()
        if NAMES in schema
    }


def schema_of(cls: type[BaseModel]) -> dict[str, Any]:
    """The fields in the table's entry for an objective's class: each with its JSON schema, without
    words.
    """
    words = ("title", "description", "default")
    return {
        field: {key: value for key, value in schema.items() if key not in words}
        for field, schema in cls.model_json_schema()["properties"].items()
    }


def annotation(schema: dict[str, Any]) -> Any:
    """The type that a field's JSON schema describes. ValueError for what the table cannot say."""
    if unknown := set(schema) - {"type", "enum", "const", "anyOf", NAMES, REFUSED, *LIMITS}:
        raise ValueError(f"{schema}: {', '.join(sorted(unknown))} is not understood")
    if "anyOf" in schema:
        return Union[tuple(annotation(member) for member in schema["anyOf"])]  # noqa: UP007
    if "enum" in schema:
        return Literal[tuple(schema["enum"])]
    if "const" in schema:
        return Literal[schema["const"]]

    limits: Any = {LIMITS[key]: value for key, value in schema.items() if key in LIMITS}
    kind = TYPES[schema["type"]]
    return Annotated[kind, Field(**limits)] if limits else kind


@cache
def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())
    return table
