"""Rows from a file, a saved dataset folder, a hub name or a list. JSONL, JSON and CSV are read here
so that a bad line is named by file and line, and no value changes its type on the way; Parquet and
`datasets` go through those libraries.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from alignkit.config.data import DataConfig
from alignkit.errors import ConfigError, DataError

MAX_LINE = 64 * 2**20  # bytes of one JSONL line or CSV cell
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
Source = str | Path | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """One row. `values` is None where it could not be read; then `problem` says why."""

    number: int  # the line of a JSONL file, the position from 1 elsewhere
    values: Mapping[str, Any] | None
    problem: str = ""


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


def read_rows(config: DataConfig, source: Source | None = None) -> Rows:
    """Every row of `source` (default: config.train), with `config.columns` renamed.

    Raises DataError for a source that does not exist or cannot be read, ConfigError for `task:`,
    which only the command line can resolve. A row that cannot be read raises nothing: its `problem`
    says why.
    """
    source = config.train if source is None else source
    if isinstance(source, str | Path):
        rows = _read_named(source, config)
    else:
        rows = Rows("rows", "the given rows", _numbered(source))
    return _renamed(rows, config.columns)


def _read_named(source: str | Path, config: DataConfig) -> Rows:
    """The rows of a file, a folder, or else a dataset of the hub."""
    name = str(source)
    if name.startswith("task:"):
        raise ConfigError(
            f"data: {name} is made by the command line; in Python pass the task's rows as `source`"
        )

    path = Path(source).expanduser()
    if path.is_file():
        try:
            return Rows(path.name, str(path), list(_read_file(path, config)))
        except OSError as error:
            raise DataError(f"data: cannot read {path} ({error.strerror})") from None
    if path.is_dir():
        rows = _numbered(_read_folder(path, config))
        return Rows(path.name, f"{path} split {config.split}", rows)

    # Hub names look like paths; what can only be a path is not looked up on the hub.
    if path.suffix in SUFFIXES or path.is_absolute() or name.startswith((".", "~")):
        raise _no_such_path(path)
    return Rows(name, f"dataset {name} split {config.split}", _numbered(_read_hub(name, config)))


def _no_such_path(path: Path) -> DataError:
    neighbours = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, neighbours, n=1)
    hint = f"; {close[0]} is there" if close else ""
    return DataError(f"data: there is no file or folder {path}{hint}")


def read_jsonl(path: Path, limit: int = MAX_LINE) -> Iterator[Row]:
    """One row per line; blank lines are skipped; a BOM and CRLF are allowed; lines above `limit`
    bytes are not kept in memory.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(limit + 1):
            number += 1
            if number == 1:
                line = _without_bom(line, path)
            if len(line) > limit and not line.endswith(b"\n"):
                while (rest := file.readline(limit)) and not rest.endswith(b"\n"):
                    pass
                yield Row(number, None, f"the line is longer than {limit} bytes")
            elif line.strip():
                yield _parse_line(line, number)


def _without_bom(line: bytes, path: Path) -> bytes:
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}:1: the file is UTF-16; save it as UTF-8")
    return line.removeprefix(b"\xef\xbb\xbf")


def _parse_line(line: bytes, number: int) -> Row:
    try:
        value = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row(number, None, f"not UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return Row(number, None, f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        # a number of thousands of digits, brackets nested too deeply
        return Row(number, None, str(error))
    return _object_row(number, value)


def _object_row(number: int, value: object) -> Row:
    if isinstance(value, Mapping):
        return Row(number, value)
    return Row(number, None, f"a JSON {type(value).__name__}, expected an object with the columns")


def _numbered(values: Iterable[object]) -> list[Row]:
    return [_object_row(number, value) for number, value in enumerate(values, 1)]


def _read_file(path: Path, config: DataConfig) -> Iterable[Row]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return read_jsonl(path)
    if suffix == ".json":
        return _read_json(path, config.split)
    if suffix in (".csv", ".tsv"):
        return _read_csv(path, "," if suffix == ".csv" else "\t")
    if suffix == ".parquet":
        return _numbered(_read_parquet(path))
    raise DataError(
        f"data: {path} ends in {suffix or 'no suffix'}; "
        f"files that can be read end in {', '.join(SUFFIXES)}"
    )


def _read_json(path: Path, split: str) -> Iterable[Row]:
    try:
        value = json.loads(_without_bom(path.read_bytes(), path).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under a .json name, as the hub has them
            return read_jsonl(path)
        raise DataError(f"{path}:{error.lineno}: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}") from None

    # An object holds the rows under the split's name or `data`, or it is the only row itself.
    if isinstance(value, dict):
        value = value.get(split, value.get("data", [value]))
    if not isinstance(value, list):
        raise DataError(
            f"{path}: expected a JSON list of rows, "
            f"or an object with such a list under `{split}` or `data`"
        )
    return _numbered(value)


def _read_csv(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE)
    # undecodable bytes become lone surrogates, so that the row is named by the check every text
    # goes through
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for number, row in enumerate(reader, 1):
                surplus = len(row.pop(None, ()))
                problem = f"{surplus} more cells than the header has columns"
                yield Row(number, None, problem) if surplus else Row(number, row)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.reader.line_num}: not valid CSV ({error})") from None


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a valid Parquet file ({_one_line(error)})") from None


def _read_folder(path: Path, config: DataConfig) -> Iterable[object]:
    import datasets

    marks = ("dataset_info.json", "dataset_dict.json", "state.json")  # save_to_disk writes one
    if not any((path / mark).exists() for mark in marks):
        return _read_hub(str(path), config)  # a folder of data files
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(
            f"{path}: not a dataset saved with save_to_disk ({_one_line(error)})"
        ) from None
    if isinstance(dataset, datasets.DatasetDict):
        if config.split not in dataset:
            raise DataError(
                f"{path}: no split `{config.split}`; data.split can be {', '.join(dataset)}"
            )
        return list(dataset[config.split])
    return list(dataset)


def _read_hub(name: str, config: DataConfig) -> Iterable[object]:
    import datasets

    try:
        dataset: Iterable[object] = datasets.load_dataset(name, config.subset, split=config.split)
    except Exception as error:  # the library has no common base class for what can go wrong here
        raise DataError(
            f"data: cannot load `{name}` split `{config.split}` ({_one_line(error)}); "
            f"data.train is a file ending in {', '.join(SUFFIXES)}, a saved dataset folder, "
            "a hub name or task:NAME"
        ) from None
    return dataset


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _renamed(rows: Rows, columns: Mapping[str, str]) -> Rows:
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
        Row(row.number, None if row.values is None else rename(row.values), row.problem)
        for row in rows.rows
    ]
    return Rows(rows.name, rows.where, renamed)
