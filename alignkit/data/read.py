"""Rows from a file, a saved dataset folder, a hub name or a list. Saved datasets and hub names go
through `datasets`, files through `file_formats.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any

from alignkit.config.data import DataConfig
from alignkit.config.row_sources import RowSource
from alignkit.data.file_formats import (
    SUFFIXES,
    Row,
    data_suffix,
    no_such_split,
    numbered,
    read_file,
)
from alignkit.data.slices import Slice, without_slice
from alignkit.errors import ConfigError, DataError, first_line
from alignkit.files import sha256_of_file

HELD_OUT_SPLITS = ("validation", "test", "eval")  # the first that exists serves for evaluation


@dataclass(frozen=True)
class HeldOut:
    """The held-out part of a source, see `held_out`."""

    source: RowSource

    def __str__(self) -> str:
        return self.source.source


Source = str | Path | HeldOut | RowSource | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Part:
    """The part of a source that is read: the first of `splits` that exists, in `subset`."""

    splits: tuple[str, ...]
    subset: str | None


@dataclass(frozen=True)
class Stream:
    """Rows that are read anew each time somebody goes through them, so that a file of any size
    takes no memory.
    """

    read: Callable[[], Iterable[Row]]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.read())


@dataclass(frozen=True)
class Rows:
    """All rows of a source. `name` is short (for row ids), `where` names the source in messages."""

    name: str
    where: str
    rows: Iterable[Row]  # a list or a Stream
    # What the rows are a function of, as JSON: hashes of files; None where that is not known.
    content: Callable[[], Any] = lambda: None

    @cached_property
    def keys(self) -> dict[str, bool]:
        """Every column in the order of their first appearance -> whether it holds a value in at
        least one row.
        """
        keys: dict[str, bool] = {}
        for row in self.rows:
            for key, value in (row.values or {}).items():
                if not keys.get(key):
                    keys[key] = value is not None
        return keys

    @property
    def columns(self) -> list[str]:
        """Columns that hold a value in at least one row."""
        return [key for key, has_value in self.keys.items() if has_value]


def held_out(config: DataConfig) -> HeldOut | None:
    """What `data.eval` names, of several sets the first, as a source for `read_rows`; None where it
    is not set.

    Of a set with several splits, its own or `data.eval_split` is read, or else one that is named as
    held-out splits are, which is never one that is trained on.
    """
    sources = list(config.held_out_sources().values())
    return HeldOut(sources[0]) if sources else None


def read_rows(config: DataConfig, source: Source | None = None) -> Rows:
    """Every row of `source` (default: config.train), with `config.columns` renamed.

    Raises DataError for a source that does not exist or cannot be read (some of that only when its
    rows are gone through), ConfigError for `task:`, which only the command line can resolve. A row
    that cannot be read raises nothing: its `problem` says why.
    """
    return renamed(open_source(config, source), reading(config, source).columns)


def reading(config: DataConfig, source: Source | None) -> DataConfig:
    """The section as it reads `source` (default: config.train), which may have columns of its own."""
    if source is None:
        source = only_source(config)
    own = source.source if isinstance(source, HeldOut) else source
    return config.reading(own) if isinstance(own, RowSource) else config


def open_source(config: DataConfig, source: Source | None = None) -> Rows:
    """As `read_rows`, under the names that the columns have in the source."""
    if source is None:
        source = only_source(config)
    if isinstance(source, RowSource):
        part = _Part((source.split or config.split,), source.subset or config.subset)
        return _first_rows(_read_named(source.source, part), source.max_rows)
    if isinstance(source, HeldOut):
        held = source.source
        rows = _read_named(held.source, _held_out_part(config, held))
        return _first_rows(rows, held.max_rows)
    if isinstance(source, str | Path):
        return _read_named(source, _Part((config.split,), config.subset))
    given = list(source)
    return Rows("rows", "the given rows", list(numbered(given)), lambda: given)


def only_source(config: DataConfig) -> RowSource:
    """The one source that is trained on. ConfigError where there are several, which no function of
    one source can read.
    """
    sources = config.sources()
    if len(sources) > 1:
        raise ConfigError(
            f"data.train is a list of {len(sources)} sources; pass one of config.sources() as "
            "`source`, or all of them through load_mixture"
        )
    return sources[0]


def _first_rows(rows: Rows, most: int | None) -> Rows:
    """The first `most` rows; None: all."""
    if most is None:
        return rows
    first = Stream(lambda: islice(rows.rows, most))

    def content() -> Any:
        whole = rows.content()
        return None if whole is None else [whole, most]

    return replace(rows, rows=first, content=content)


def _held_out_part(config: DataConfig, held: RowSource) -> _Part:
    subset = held.subset or config.eval_subset or config.subset
    split = held.split or config.eval_split
    if split is not None:
        return _Part((split,), subset)

    # A set that is trained on has another part for evaluation, or none that could serve.
    trained = {
        source.split or config.split
        for source in config.sources()
        if source.source == held.source and (source.subset or config.subset) == subset
    }
    if trained:
        return _Part(tuple(s for s in HELD_OUT_SPLITS if s not in trained), subset)
    return _Part((*HELD_OUT_SPLITS, config.split), subset)


def _read_named(source: str | Path, part: _Part) -> Rows:
    """The rows of a file, a folder, or else a dataset of the hub."""
    name = str(source)
    if name.startswith("task:"):
        raise ConfigError(
            f"data: {name} is made by the command line; in Python pass the task's rows as `source`"
        )

    # The library cuts what it reads itself; files and saved sets are cut here.
    path = Path(source).expanduser()
    splits, cut = without_slice(part.splits)
    whole = replace(part, splits=splits)
    if path.is_file():
        return _cut(_of_file(path, whole), cut)
    if has_magic(name) and not path.exists():
        return _cut(_of_files(path, whole), cut)
    if path.is_dir() and not _is_saved(path):  # a folder of data files
        split, dataset = _read_hub(str(path), part)
        return _of_dataset(path.name, f"{path} split {split}", dataset)
    if path.is_dir():
        split, dataset = _read_folder(path, whole)
        return _cut(_of_dataset(path.name, f"{path} split {split}", dataset), cut)

    # Hub names look like paths; what can only be a path is not looked up on the hub.
    if data_suffix(path) in SUFFIXES or path.is_absolute() or name.startswith((".", "~")):
        raise _no_such_path(path)
    split, dataset = _read_hub(name, part)
    return _of_dataset(name, f"dataset {name} split {split}", dataset)


def _cut(rows: Rows, cut: Slice | None) -> Rows:
    """A part of the rows; None: all."""
    if cut is None:
        return rows

    def content() -> Any:
        whole = rows.content()
        return None if whole is None else [whole, cut.start, cut.stop]

    where = f"{rows.where}[{cut.start}:{cut.stop}]"
    return replace(rows, where=where, rows=Stream(lambda: cut.of(rows.rows)), content=content)


def _of_file(path: Path, part: _Part) -> Rows:
    def rows() -> Iterator[Row]:
        with _readable(path):
            yield from read_file(path, part.splits)

    def content() -> Any:
        return [path.name, part.splits, sha256_of_file(path)]

    with _readable(path):
        read_file(path, part.splits)  # refuses what its name does not allow
    return Rows(path.name, str(path), Stream(rows), content)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """DataError where the file system refuses the file inside the block."""
    try:
        yield
    except OSError as error:
        raise DataError(f"data: cannot read {path} ({error.strerror})") from None


def _of_files(pattern: Path, part: _Part) -> Rows:
    """The rows of all files that match `pattern`, in the order of their names, numbered through."""
    paths = sorted(path for path in map(Path, glob(str(pattern), recursive=True)) if path.is_file())
    if not paths:
        raise DataError(f"data: no file matches {pattern}")
    files = [_of_file(path, part) for path in paths]

    def rows() -> Iterator[Row]:
        number = 0
        for file in files:
            for row in file.rows:
                number += 1
                yield replace(row, number=number, place=f"{file.name}:{row.number}")

    return Rows(pattern.name, str(pattern), Stream(rows), lambda: [f.content() for f in files])


def _of_dataset(name: str, where: str, dataset: Any) -> Rows:
    def content() -> Any:
        """The fingerprint says which rows of which files they are."""
        files = [sha256_of_file(Path(file["filename"])) for file in dataset.cache_files]
        return [name, dataset._fingerprint, files] if files else None

    return Rows(name, where, Stream(lambda: numbered(dataset)), content)


def _no_such_path(path: Path) -> DataError:
    if path.exists():  # a pipe, a socket, a device
        return DataError(
            f"data: {path} is neither a file nor a folder; rows are read more than once, "
            "so write them into a file"
        )
    neighbours = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, neighbours, n=1)
    hint = f"; {close[0]} is there" if close else ""
    return DataError(f"data: there is no file or folder {path}{hint}")


def _is_saved(path: Path) -> bool:
    """Whether `save_to_disk` has written the folder."""
    marks = ("dataset_info.json", "dataset_dict.json", "state.json")
    return any((path / mark).exists() for mark in marks)


def _read_folder(path: Path, part: _Part) -> tuple[str, Any]:
    """The name of the split that was read, and its rows."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(
            f"{path}: not a dataset saved with save_to_disk ({first_line(error)})"
        ) from None
    if isinstance(dataset, datasets.DatasetDict):
        split = _existing_split(str(path), part, list(dataset))
        return split, dataset[split]
    return str(dataset.split or "train"), dataset


def _read_hub(name: str, part: _Part) -> tuple[str, Any]:
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
    there = rows.keys if columns else {}
    if not there:
        return rows
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

    def all_renamed() -> Iterator[Row]:
        for row in rows.rows:
            yield row if row.values is None else replace(row, values=rename(row.values))

    in_memory = isinstance(rows.rows, list)
    return replace(rows, rows=list(all_renamed()) if in_memory else Stream(all_renamed))
