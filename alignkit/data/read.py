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
        found: dict[str, None] = {}
        for row in self.rows:
            found |= {key: None for key, value in (row.values or {}).items() if value is not None}
        return list(found)


def read_rows(config: DataConfig, source: Source | None = None) -> Rows:
    """Every row of `source` (default: config.train), with `config.columns` renamed. Errors:
    DataError, ConfigError.
    """
    source = config.train if source is None else source
    if not isinstance(source, str | Path):
        return _renamed(Rows("rows", "the given rows", _numbered(source)), config.columns)
    if str(source).startswith("task:"):
        raise ConfigError(
            f"data: {source} is made by the command line; in Python pass the task's rows as `source`"
        )
    path = Path(source).expanduser()
    if path.is_file():
        try:
            rows = Rows(path.name, str(path), list(_read_file(path, config)))
        except OSError as error:
            raise DataError(f"data: cannot read {path} ({error.strerror})") from None
    elif path.is_dir():
        rows = Rows(
            path.name, f"{path} split {config.split}", _numbered(_read_folder(path, config))
        )
    elif path.suffix in SUFFIXES or path.is_absolute() or str(source).startswith((".", "~")):
        near = get_close_matches(
            path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [], n=1
        )
        raise DataError(
            f"data: there is no file or folder {path}" + (f"; {near[0]} is there" if near else "")
        )
    else:
        rows = Rows(
            str(source),
            f"dataset {source} split {config.split}",
            _numbered(_read_hub(str(source), config)),
        )
    return _renamed(rows, config.columns)


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
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits, brackets nested too deeply
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
        f"data: {path} ends in {suffix or 'no suffix'}; files that can be read end in {', '.join(SUFFIXES)}"
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
    if isinstance(value, dict):
        value = value.get(split, value.get("data", [value]))
    if not isinstance(value, list):
        raise DataError(
            f"{path}: expected a JSON list of rows, or an object with such a list under `{split}` or `data`"
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

    if not any(
        (path / name).exists() for name in ("dataset_info.json", "dataset_dict.json", "state.json")
    ):
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
    except (
        Exception
    ) as error:  # the hub library has no common base class for what can go wrong here
        advice = f"data.train is a file ending in {', '.join(SUFFIXES)}, a saved dataset folder, a hub name or task:NAME"
        raise DataError(
            f"data: cannot load `{name}` split `{config.split}` ({_one_line(error)}); {advice}"
        ) from None
    return dataset


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _renamed(rows: Rows, columns: Mapping[str, str]) -> Rows:
    if not columns or not rows.rows:
        return rows
    found = list(dict.fromkeys(key for row in rows.rows for key in row.values or ()))
    for ours, theirs in columns.items():
        if theirs not in found:
            near = get_close_matches(theirs, found, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise DataError(
                f"{rows.where}: data.columns.{ours}={theirs}, but the columns are {', '.join(found)}{hint}"
            )

    def rename(values: Mapping[str, Any]) -> dict[str, Any]:
        kept = {
            key: value
            for key, value in values.items()
            if key not in columns.values() and key not in columns
        }
        return kept | {ours: values[theirs] for ours, theirs in columns.items() if theirs in values}

    renamed = [
        Row(row.number, None if row.values is None else rename(row.values), row.problem)
        for row in rows.rows
    ]
    return Rows(rows.name, rows.where, renamed)
