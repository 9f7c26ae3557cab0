"""Rows of one file. JSONL, JSON and CSV are read here so that a bad line is named by file and line,
and no value changes its type on the way; Parquet goes through pyarrow. Text files may be compressed.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from alignkit.errors import DataError, first_line

MAX_LINE = 64 * 2**20  # bytes of one JSONL line or CSV cell

# A packed file that grows beyond both of these is refused: it would fill the memory.
_GROWTH = 200  # times its size
_ALWAYS_ALLOWED = 256 * 2**20  # bytes

_BATCH = 256  # rows of a Parquet file that are decoded at once
_ROW = 64  # bytes counted for a row beside its values
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
TEXT_SUFFIXES = SUFFIXES[:-1]


def _open_with_arrow(path: Path, mode: str) -> BinaryIO:
    """`path` for reading, for compressions that Python does not bring along."""
    import pyarrow as pa

    codec = {".zst": "zstd", ".lz4": "lz4"}[path.suffix.lower()]
    stream: Any = pa.CompressedInputStream(pa.OSFile(str(path), mode), codec)
    return io.BufferedReader(stream)


# Suffix of a compressed text file -> what opens it.
COMPRESSIONS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".lzma": lzma.open,
    ".zst": _open_with_arrow,
    ".lz4": _open_with_arrow,
}


@dataclass(frozen=True)
class Row:
    """One row. `values` is None where it cannot be used; then `problem` says why, and `verdict` (a key
    of `verdicts.VERDICTS`) what kind of fault that is.
    """

    number: int  # the line of a JSONL file, the position from 1 elsewhere
    values: Mapping[str, Any] | None
    problem: str = ""
    place: str = ""  # file and line, where the rows come from several files
    verdict: str = "unreadable"


def data_suffix(path: Path) -> str:
    """The suffix that says what `path` holds, such as `.jsonl` of `pairs.jsonl.gz`; empty where
    there is none.
    """
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        suffix = Path(path.stem).suffix.lower()
    return suffix


def read_file(path: Path, splits: Sequence[str]) -> Iterable[Row]:
    """The rows of `path`; `splits` names the parts of a JSON object to take, the first that exists.

    Raises DataError for a file that cannot be read as what its name says, and for one without splits
    of which another one than `train` is asked; OSError for one that cannot be opened.
    """
    suffix = data_suffix(path)
    compression = path.suffix.lower() if path.suffix.lower() != suffix else ""
    readable = suffix in TEXT_SUFFIXES if compression else suffix in SUFFIXES
    if not readable:
        ending = "".join(path.suffixes[-2:]) or "no suffix"
        raise DataError(
            f"data: {path} ends in {ending}; files that can be read end in {', '.join(SUFFIXES)}; "
            f"all but Parquet may be compressed ({', '.join(COMPRESSIONS)})"
        )

    if suffix != ".json":
        _refuse_split(path, splits)
    if suffix == ".parquet":
        return numbered(_read_parquet(path))
    if suffix in (".csv", ".tsv"):
        return _decompressed(path, _read_csv(path, "," if suffix == ".csv" else "\t"))
    if suffix == ".json":
        return _decompressed(path, _read_json(path, splits))
    return _decompressed(path, read_jsonl(path))


def _open(path: Path) -> BinaryIO:
    """`path` for reading bytes, decompressed where its suffix says that it is compressed."""
    opener = COMPRESSIONS.get(path.suffix.lower())
    return path.open("rb") if opener is None else io.BufferedReader(_Bounded(path, opener))


class _Bounded(io.RawIOBase):
    """The bytes of a compressed file. Raises DataError once there are far more than it has."""

    def __init__(self, path: Path, opener: Callable[..., BinaryIO]):
        self.path = path
        self.unpacked = opener(path, "rb")
        self.allowed = _allowed(path)
        self.total = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as there is something, and return how far."""
        data = self.unpacked.read(len(buffer))
        buffer[: len(data)] = data
        self.total += len(data)
        _check_growth(self.path, self.total, self.allowed)
        return len(data)

    def close(self) -> None:
        """Close the file too."""
        self.unpacked.close()
        super().close()


def _allowed(path: Path) -> int:
    """The most bytes that a packed file may grow to."""
    return max(_ALWAYS_ALLOWED, _GROWTH * path.stat().st_size)


def _check_growth(path: Path, unpacked: int, allowed: int) -> None:
    if unpacked > allowed:
        raise DataError(
            f"{path}: its {path.stat().st_size:,} bytes grow to more than {allowed:,} when they "
            f"are read; up to {_GROWTH} times their size, or {_ALWAYS_ALLOWED >> 20} MiB, are "
            "allowed, since more would fill the memory. Unpack it into JSONL if it is meant so"
        )


def _decompressed(path: Path, rows: Iterable[Row]) -> Iterator[Row]:
    """`rows` of `path`, with a DataError where the file cannot be decompressed."""
    damage = (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError)
    try:
        yield from rows
    except damage as error:
        raise DataError(f"{path}: cannot be decompressed ({first_line(error)})") from None
    except OSError as error:
        if error.errno is not None:  # the file system's own
            raise
        raise DataError(f"{path}: cannot be decompressed ({first_line(error)})") from None


def read_jsonl(path: Path, limit: int = MAX_LINE) -> Iterator[Row]:
    """One row per line; blank lines are skipped; a BOM and CRLF are allowed; lines above `limit`
    bytes are not kept in memory.
    """
    with _open(path) as file:
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
        value = _json(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        return Row(number, None, f"not UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return Row(number, None, f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        # a number of thousands of digits, brackets nested too deeply
        return Row(number, None, str(error))
    return _object_row(number, value)


def _json(text: str) -> Any:
    """`text` as JSON. ValueError where a name stands twice in an object: one of the two values
    would be lost.
    """
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"the name {_repeated(name for name, _ in pairs)!r} stands twice")
    return values


def _repeated(names: Iterable[str]) -> str | None:
    """The first of `names` that stands among them twice; None where there is none."""
    earlier: set[str] = set()
    for name in names:
        if name in earlier:
            return name
        earlier.add(name)
    return None


def _check_columns(path: Path, names: Sequence[str]) -> None:
    """DataError where two columns have one name: one of them would be lost. Columns without a name
    are never read, so there may be several.
    """
    name = _repeated(filter(None, names))
    if name is not None:
        raise DataError(f"{path}: two columns are named {name!r}; rename or remove one of them")


def _object_row(number: int, value: object) -> Row:
    if isinstance(value, Mapping):
        return Row(number, value)
    return Row(number, None, f"a JSON {type(value).__name__}, expected an object with the columns")


def numbered(values: Iterable[object]) -> Iterator[Row]:
    """Rows that have no line numbers of their own, counted from 1."""
    return (_object_row(number, value) for number, value in enumerate(values, 1))


def _read_json(path: Path, splits: Sequence[str]) -> Iterator[Row]:
    with _open(path) as file:
        content = _without_bom(file.read(), path)
    try:
        value = _json(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under a .json name, as the hub has them
            _refuse_split(path, splits)
            yield from read_jsonl(path)
            return
        raise DataError(f"{path}:{error.lineno}: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}") from None

    # An object holds the rows under the split's name or `data`, or it is the only row itself.
    if isinstance(value, dict):
        name = next((name for name in (*splits, "data") if name in value), None)
        if name is None and _holds_splits(value):
            raise no_such_split(path, splits, list(value))
        value = [value] if name is None else value[name]
    else:
        _refuse_split(path, splits)
    if not isinstance(value, list):
        raise DataError(
            f"{path}: expected a JSON list of rows, "
            f"or an object with such a list under `{splits[0]}` or `data`"
        )
    yield from numbered(value)


def _refuse_split(path: Path, splits: Sequence[str]) -> None:
    """Raises DataError where one split is asked of a file that has none."""
    if len(splits) == 1 and splits[0] != "train":
        raise DataError(
            f"{path}: no split `{splits[0]}`, since the file has no splits; leave it out, or take a "
            "part of the rows as train[:90%]"
        )


def _holds_splits(value: Mapping[str, Any]) -> bool:
    """Whether a JSON object is several lists of rows, and not one row with lists of messages."""
    lists = [rows for rows in value.values() if isinstance(rows, list) and rows]
    items = [item for rows in lists for item in rows]
    are_rows = all(isinstance(item, dict) and not {"role", "from"} & set(item) for item in items)
    return bool(items) and len(lists) == len(value) and are_rows


def no_such_split(path: object, wanted: Sequence[str], there: Sequence[str]) -> DataError:
    """The error for a source that has none of the `wanted` splits; it names those that exist."""
    names = " or ".join(f"`{name}`" for name in wanted)
    return DataError(f"{path}: no split {names}; the splits are {', '.join(there)}")


def _read_csv(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_LINE)
    # undecodable bytes become lone surrogates, so that the row is named by the check every text
    # goes through
    with (
        _open(path) as binary,
        io.TextIOWrapper(binary, "utf-8-sig", "surrogateescape", newline="") as file,
    ):
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            _check_columns(path, reader.fieldnames or ())
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
        allowed = _allowed(path)
        file = pq.ParquetFile(path)
        _check_columns(path, file.schema_arrow.names)
        decode = _json_decoder(file.schema_arrow)
        groups = range(file.metadata.num_row_groups)
        stated = sum(file.metadata.row_group(group).total_byte_size for group in groups)
        _check_growth(path, stated, allowed)

        decoded = 0
        for batch in file.iter_batches(batch_size=_BATCH):
            # Repeated values stand in the file once, so what it states is no limit.
            decoded += batch.nbytes + batch.num_rows * _ROW
            _check_growth(path, decoded, allowed)
            for row in batch.to_pylist():
                yield decode(row)
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a valid Parquet file ({first_line(error)})") from None


def _json_decoder(schema: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What turns a row of a Parquet file into its values: columns, or parts of columns, of
    `datasets`' type `Json` hold JSON as text.
    """
    description = str(schema) + str(schema.metadata)
    if "arrow.json" not in description and '"Json"' not in description:
        return lambda row: row

    from datasets import Features

    features: Any = Features.from_arrow_schema(schema)
    decode: Callable[[dict[str, Any]], dict[str, Any]] = features.decode_example
    return decode
