"""Rows from a file, a saved dataset folder, a hub name or a list. Saved datasets and hub names go
through `datasets`, files through `file_formats.py`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from alignkit.config.data import DataConfig
from alignkit.data.file_formats import (
    SUFFIXES,
    Row,
    data_suffix,
    no_such_split,
    numbered,
    read_file,
)
from alignkit.errors import ConfigError, DataError, first_line

HELD_OUT_SPLITS = ("validation", "test", "eval")  # the first that exists serves for evaluation


@dataclass(frozen=True)
class HeldOut:
    """The held-out part of the set `name`, see `held_out`."""

    name: str

    def __str__(self) -> str:
        return self.name


Source = str | Path | HeldOut | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Part:
    """The part of a source that is read: the first of `splits` that exists, in `subset`."""

    splits: tuple[str, ...]
    subset: str | None


@dataclass(frozen=True)
class Rows:
    """All rows of a source. `name` is short (for row ids), `where` names the source in messages."""

    name: str
    where: str
    rows: list[Row]

    @property
    def columns(self) -> list[str]:
        """Columns that hold a value in at least one row, in the order of their first appearance."""
        names: dict[str, None] = {}  # an ordered set
        for row in self.rows:
            names |= {key: None for key, value in (row.values or {}).items() if value is not None}
        return list(names)


def held_out(config: DataConfig) -> HeldOut | None:
    """What `data.eval` names, as a source for `read_rows`; None where it is not set.

    Of a set with several splits, `data.eval_split` is read, or else one that is named as held-out
    splits are, which is never the one that is trained on.
    """
    return None if config.eval is None else HeldOut(config.eval)


def read_rows(config: DataConfig, source: Source | None = None) -> Rows:
    """Every row of `source` (default: config.train), with `config.columns` renamed.

    Raises DataError for a source that does not exist or cannot be read, ConfigError for `task:`,
    which only the command line can resolve. A row that cannot be read raises nothing: its `problem`
    says why.
    """
    source = config.train if source is None else source
    if isinstance(source, HeldOut):
        rows = _read_named(source.name, _held_out_part(config, source.name))
    elif isinstance(source, str | Path):
        rows = _read_named(source, _Part((config.split,), config.subset))
    else:
        rows = Rows("rows", "the given rows", numbered(source))
    return renamed(rows, config.columns)


def _held_out_part(config: DataConfig, name: str) -> _Part:
    subset = config.eval_subset or config.subset
    if config.eval_split is not None:
        return _Part((config.eval_split,), subset)

    # The set that is trained on has another part for evaluation, or none that could serve.
    if name == config.train and subset == config.subset:
        return _Part(tuple(s for s in HELD_OUT_SPLITS if s != config.split), subset)
    return _Part((*HELD_OUT_SPLITS, config.split), subset)


def _read_named(source: str | Path, part: _Part) -> Rows:
    """The rows of a file, a folder, or else a dataset of the hub."""
    name = str(source)
    if name.startswith("task:"):
        raise ConfigError(
            f"data: {name} is made by the command line; in Python pass the task's rows as `source`"
        )

    path = Path(source).expanduser()
    if path.is_file():
        try:
            return Rows(path.name, str(path), list(read_file(path, part.splits)))
        except OSError as error:
            raise DataError(f"data: cannot read {path} ({error.strerror})") from None
    if has_magic(name) and not path.exists():
        return Rows(path.name, str(path), list(_read_files(path, part)))
    if path.is_dir():
        split, values = _read_folder(path, part)
        return Rows(path.name, f"{path} split {split}", numbered(values))

    # Hub names look like paths; what can only be a path is not looked up on the hub.
    if data_suffix(path) in SUFFIXES or path.is_absolute() or name.startswith((".", "~")):
        raise _no_such_path(path)
    split, values = _read_hub(name, part)
    return Rows(name, f"dataset {name} split {split}", numbered(values))


def _read_files(pattern: Path, part: _Part) -> Iterator[Row]:
    """The rows of all files that match `pattern`, in the order of their names, numbered through."""
    paths = sorted(path for path in map(Path, glob(str(pattern), recursive=True)) if path.is_file())
    if not paths:
        raise DataError(f"data: no file matches {pattern}")

    number = 0
    for path in paths:
        for row in _read_named(path, part).rows:
            number += 1
            yield replace(row, number=number, place=f"{path.name}:{row.number}")


def _no_such_path(path: Path) -> DataError:
    neighbours = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, neighbours, n=1)
    hint = f"; {close[0]} is there" if close else ""
    return DataError(f"data: there is no file or folder {path}{hint}")


def _read_folder(path: Path, part: _Part) -> tuple[str, Iterable[object]]:
    """The name of the split that was read, and its rows."""
    import datasets

    marks = ("dataset_info.json", "dataset_dict.json", "state.json")  # save_to_disk writes one
    if not any((path / mark).exists() for mark in marks):
        return _read_hub(str(path), part)  # a folder of data files
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(
            f"{path}: not a dataset saved with save_to_disk ({first_line(error)})"
        ) from None
    if isinstance(dataset, datasets.DatasetDict):
        split = _existing_split(str(path), part, list(dataset))
        return split, list(dataset[split])
    return str(dataset.split or "train"), list(dataset)


def _read_hub(name: str, part: _Part) -> tuple[str, Iterable[object]]:
    """The name of the split that was read, and its rows."""
    import datasets

    first = part.splits[0]
    try:
        # Slices such as train[:100] are for the library to understand.
        if not first.isidentifier():
            return first, datasets.load_dataset(name, part.subset, split=first)
        dataset: Any = datasets.load_dataset(name, part.subset)
    except Exception as error:  # the library has no common base class for what can go wrong here
        raise DataError(
            f"data: cannot load `{name}` split `{first}` ({first_line(error)}); "
            f"data.train is a file ending in {', '.join(SUFFIXES)}, a saved dataset folder, "
            "a hub name or task:NAME"
        ) from None
    split = _existing_split(name, part, list(dataset))
    return split, dataset[split]


def _existing_split(name: str, part: _Part, there: Sequence[str]) -> str:
    """The first split of `part` that exists. Raises DataError, which names those that do."""
    split = next((split for split in part.splits if split in there), None)
    if split is None:
        raise no_such_split(name, part.splits, there)
    return split


def renamed(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """`rows` with the columns called what we call them; `columns` maps our name to theirs."""
    if not columns or not rows.rows:
        return rows

    there = list(dict.fromkeys(key for row in rows.rows for key in row.values or ()))
    for ours, theirs in columns.items():
        if theirs not in there:
            close = get_close_matches(theirs, there, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise DataError(
                f"{rows.where}: data.columns.{ours}={theirs}, "
                f"but the columns are {', '.join(there)}{hint}"
            )

    # A column of the source that already has our name makes way for the one that is mapped to it.
    taken = {*columns, *columns.values()}

    def rename(values: Mapping[str, Any]) -> dict[str, Any]:
        others = {key: value for key, value in values.items() if key not in taken}
        mapped = {ours: values[theirs] for ours, theirs in columns.items() if theirs in values}
        return others | mapped

    renamed = [
        row if row.values is None else replace(row, values=rename(row.values)) for row in rows.rows
    ]
    return Rows(rows.name, rows.where, renamed)
