"""Hashes of everything that a run reads besides its recipe: models, data and code.

A recipe names files whose content may change while their names stay. A result belongs to the
content, so it is kept with these hashes. Importing this imports no torch.
"""

import json
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from alignkit.config.code_hash import code_hash
from alignkit.config.data import DataConfig
from alignkit.config.recipe import REFERENCES
from alignkit.config.row_sources import RowSource
from alignkit.config.text import Keys
from alignkit.data.read import HeldOut, read_rows
from alignkit.errors import DataError
from alignkit.files import sha256_of_file, sha256_of_json
from alignkit.tasks import DEFAULT_TASK, resolve

# What a field of a recipe names, wherever it stands in it.
CODE = ("function", "verifier", "import", "environment", "tools")
MODEL = ("name_or_path", "path", "kind", "model", "ensemble", "rewriter")
DATA = ("train", "eval", "prompts", "source")
FILE = ("chat_template",)
PARTS = ("train", "split", "subset", "eval_split", "eval_subset")
SOURCE_PARTS = ("source", "split", "subset", "max_rows")

# Files of a model's folder that change nothing about the model.
BESIDE = (".md", ".txt", ".log", ".png")
DIGITS = 16

Inputs = dict[str, str]  # field and value, such as "data.train (pairs.jsonl)" -> hash
Section = Mapping[str, Any]


def inputs_of(sections: Section) -> Inputs:
    """The hash of every file, folder and function that some sections of a recipe (as JSON) name.

    A folder counts with the content of its files, a model of the hub with its commit, a data set of
    the hub with its rows. What cannot be read is left out; loading it will say why.
    """
    inputs = {}
    names_task = False
    for section, path, value in _texts(sections):
        names_task = names_task or value.startswith("task:")
        content = _hash(*_of_a_source(sections, section, path), value)
        if content is not None:
            inputs[f"{'.'.join(path)} ({value})"] = content[:DIGITS]

    model = sections.get("model") or {}
    if model.get("name_or_path") == "task" and not names_task:
        inputs["model.name_or_path (task)"] = _task_hash(DEFAULT_TASK)[:DIGITS]
    return inputs


def changed_inputs(before: Inputs, now: Inputs) -> list[str]:
    """Which inputs have another content now, in words. One that only one side has is a change of
    the recipe and no change of content.
    """
    return [
        f"{name} has another content"
        for name in before
        if name in now and before[name] != now[name]
    ]


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of the files in a model's or data folder; ""
    where there is neither.
    """
    if os.path.isfile(path):
        return _file_hash(path)
    if not os.path.isdir(path):
        return ""

    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.suffix not in BESIDE and not file.name.startswith(".")
    ]
    return sha256_of_json([[str(file.relative_to(path)), _file_hash(file)] for file in files])


def _texts(tree: Section, path: tuple[str, ...] = ()) -> Iterator[tuple[Section, Keys, str]]:
    """Every text in a tree, with the section that it stands in and the keys that lead to it."""
    for key, value in tree.items():
        where = (*path, str(key))
        if isinstance(value, str):
            yield tree, where, value
        elif isinstance(value, Mapping):
            yield from _texts(value, where)
        elif isinstance(value, list):
            for place, element in enumerate(value):
                if isinstance(element, Mapping):
                    yield from _texts(element, (*where, str(place)))
                elif isinstance(element, str):
                    yield tree, where, element


def _of_a_source(sections: Section, section: Section, path: Keys) -> tuple[Section, str]:
    """The section and the field that a text counts as: what one of several sources leaves open is
    as in the section around it, and named held-out sets count as `eval`.
    """
    if path[0] != "data" or len(path) < 3:
        return section, path[-1]

    chosen = {}
    if path[-1] == "source":
        chosen = {name: section[name] for name in SOURCE_PARTS if section.get(name)}
    if path[1] != "eval":
        return {**sections["data"], **chosen}, path[-1]
    if len(path) > 3 and path[-1] != "source":  # a split or the name of a column
        return section, ""
    prefixed = {f"eval_{name}": value for name, value in chosen.items()}
    return {**sections["data"], **chosen, **prefixed}, "eval"


def _hash(section: Section, field: str, value: str) -> str | None:
    """The hash of what a field of a section names; None where it names nothing that is there."""
    path = Path(value).expanduser()
    if field in CODE:
        return code_hash(value)
    if field in MODEL and value not in (*REFERENCES, "task"):
        return content_hash(path) or _commit(section, value)
    if field in DATA:
        if value.startswith("task:"):
            return _task_hash(value)
        return content_hash(path) or _hub_rows_hash(section, field, value)
    if field in FILE:
        return content_hash(path) or None
    return None


def _file_hash(path: Path) -> str:
    """SHA-256 of a file, read again only where its size or time of change is another."""
    status = path.stat()
    return _hash_as_of(str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@cache
def _hash_as_of(path: str, *_: int) -> str:
    return sha256_of_file(Path(path))


def _task_hash(name: str) -> str:
    """Of a task's model and rows."""
    return content_hash(resolve(name).model_folder.parent)


def _commit(section: Section, name: str) -> str | None:
    """The commit of a model of the hub, as it lies in the cache; None where it does not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for file in ("config.json", "adapter_config.json"):
        try:
            cached = try_to_load_from_cache(name, file, revision=section.get("revision"))
        except HFValidationError:
            return None
        if isinstance(cached, str):
            return Path(cached).parent.name
    return None


def _hub_rows_hash(section: Section, field: str, source: str) -> str | None:
    """Of the rows of a data set of the hub, as `section` chooses them."""
    chosen = {name: section[name] for name in PARTS if section.get(name)}
    rows = RowSource(source=source, max_rows=section.get("max_rows"))
    return _rows_hash(HeldOut(rows) if field == "eval" else rows, json.dumps(chosen))


@cache
def _rows_hash(source: HeldOut | RowSource, config: str) -> str | None:
    try:
        rows = read_rows(DataConfig.model_validate_json(config), source).rows
        return sha256_of_json([repr(row.values) for row in rows])
    except DataError:
        return None
