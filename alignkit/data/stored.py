"""Bundles on disk: an Arrow file that is mapped into memory, of which a run touches the rows that it
trains on.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from itertools import chain
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from alignkit.batches import Bundle
from alignkit.data.prompts import Prompt
from alignkit.policies.lazy import Joined, Selected

ROWS = "rows.arrow"
SUMMARY = "rows.json"

# One row for each bundle.
SCHEMA = pa.schema(
    {
        "ids": pa.list_(pa.int32()),  # the prompt and the completions, one behind the other
        "mask": pa.list_(pa.uint8()),  # of the completions
        "lengths": pa.list_(pa.int32()),  # of the prompt and of each completion
        "label": pa.int8(),  # null: the row has none
        "margin": pa.float64(),  # null: the row has none
        "uid": pa.string(),
        "content": pa.binary(16),  # see `contents`
    }
)


@dataclass(frozen=True)
class Packed:
    """Bundles as they are written."""

    batch: Any  # a pyarrow.RecordBatch
    trained_on: bytes  # what is hashed of them


def pack(bundles: Sequence[Bundle]) -> Packed:
    """Bundles that have no values but a label or a margin: those that come from rows."""
    if not bundles:
        return Packed(pa.RecordBatch.from_pylist([], SCHEMA), b"")

    texts = [[bundle.prompt, *bundle.completions] for bundle in bundles]
    labels = [bundle.rows.get("label") for bundle in bundles]
    margins = [bundle.rows.get("margin") for bundle in bundles]
    columns = [
        _lists(texts, pa.int32()),
        _lists([bundle.masks for bundle in bundles], pa.uint8()),
        pa.array([list(map(len, parts)) for parts in texts], SCHEMA.field("lengths").type),
        pa.array([None if label is None else int(label) for label in labels], pa.int8()),
        pa.array([None if margin is None else float(margin) for margin in margins], pa.float64()),
        pa.array([bundle.uid for bundle in bundles], pa.string()),
        pa.array(list(contents(bundles)), pa.binary(16)),
    ]
    batch = pa.record_batch(columns, schema=SCHEMA)
    return Packed(batch, b"".join(map(trained_on, bundles)))


class BundleWriter:
    """Writes bundles to a folder, part by part."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.digest = sha256()
        self.rows = 0
        self.writer = pa.ipc.new_file(str(folder / ROWS), SCHEMA)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.writer.close()
        if kind is None:
            summary = {"rows": self.rows, "fingerprint": self.digest.hexdigest()}
            (self.folder / SUMMARY).write_text(json.dumps(summary))

    def write(self, packed: Packed) -> None:
        """Append them."""
        self.digest.update(packed.trained_on)
        self.rows += packed.batch.num_rows
        if packed.batch.num_rows:
            self.writer.write_batch(packed.batch)


def _lists(rows: Sequence[Sequence[Tensor]], kind: Any) -> Any:
    """The numbers of each row's tensors, as an Arrow array of lists."""
    ends = np.cumsum([0, *(sum(map(len, parts)) for parts in rows)], dtype=np.int32)
    values = torch.cat(list(chain.from_iterable(rows))).numpy().astype(kind.to_pandas_dtype())
    return pa.ListArray.from_arrays(ends, pa.array(values))


@dataclass(frozen=True)
class _Lists:
    """A column of lists, as views of the mapped file."""

    values: Any  # numpy, of all rows
    ends: Any  # numpy, [rows + 1]

    @classmethod
    def of(cls, column: Any) -> Self:
        return cls(_numbers(column.values), _numbers(column.offsets))

    def __getitem__(self, row: int) -> Any:
        return self.values[self.ends[row] : self.ends[row + 1]]


def _numbers(array: Any) -> Any:
    """The values of an Arrow array of integers without nulls, as a view. Arrow's own `to_numpy`
    imports pandas, which takes longer than reading the rows that a short run visits.
    """
    kind = np.dtype(array.type.to_pandas_dtype())
    if not len(array):
        return np.empty(0, kind)
    values = array.buffers()[1]
    return np.frombuffer(values, kind, len(array), array.offset * kind.itemsize)


class _Part:
    """One batch of the file."""

    def __init__(self, batch: Any) -> None:
        self.ids = _Lists.of(batch["ids"])
        self.mask = _Lists.of(batch["mask"])
        self.lengths = _Lists.of(batch["lengths"])
        self.label = batch["label"]
        self.margin = batch["margin"]
        self.uid = batch["uid"]

    def bundle(self, row: int) -> Bundle:
        lengths = self.lengths[row].tolist()
        ids = torch.from_numpy(self.ids[row].astype(np.int64)).split(lengths)
        mask = torch.from_numpy(self.mask[row].astype(bool)).split(lengths[1:])
        label = self.label[row].as_py()
        rows = {} if label is None else {"label": torch.tensor([bool(label)])}
        margin = self.margin[row].as_py()
        if margin is not None:
            rows["margin"] = torch.tensor([margin], dtype=torch.float64)
        return Bundle(ids[0], list(ids[1:]), list(mask), self.uid[row].as_py(), rows)


class StoredBundles(Sequence[Bundle]):
    """The bundles that a `BundleWriter` wrote to a folder, made when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.file = pa.ipc.open_file(pa.memory_map(str(folder / ROWS)))
        self.fingerprint: str = json.loads((folder / SUMMARY).read_text())["fingerprint"]
        batches = [self.file.get_batch(i) for i in range(self.file.num_record_batches)]
        self.starts = np.cumsum([0, *(batch.num_rows for batch in batches)]).tolist()
        self.parts = [_Part(batch) for batch in batches]

    def __len__(self) -> int:
        return int(self.starts[-1])

    @overload
    def __getitem__(self, place: int) -> Bundle: ...
    @overload
    def __getitem__(self, place: slice) -> "Selected": ...
    def __getitem__(self, place: int | slice) -> "Bundle | Selected":
        if isinstance(place, slice):
            return Selected(self, range(*place.indices(len(self))))
        place = range(len(self))[place]
        part = bisect_right(self.starts, place) - 1
        return self.parts[part].bundle(place - self.starts[part])

    def contents(self) -> Iterator[bytes]:
        """What `contents` computes of each row."""
        for part in range(len(self.parts)):
            yield from self.file.get_batch(part)["content"].to_pylist()

    def row_lengths(self) -> Iterator[int]:
        """What `row_lengths` computes of each row."""
        for part in self.parts:
            for row in range(len(part.lengths.ends) - 1):
                prompt, *completions = part.lengths[row].tolist()
                yield prompt + max(completions)


def row_lengths(bundles: Sequence[Bundle]) -> Iterator[int]:
    """Tokens of the prompt and its longest completion, of each bundle."""
    if isinstance(bundles, StoredBundles):
        return bundles.row_lengths()
    if isinstance(bundles, Joined):
        return chain.from_iterable(map(row_lengths, bundles.parts))
    return (len(b.prompt) + max(map(len, b.completions)) for b in bundles)


def contents(rows: Sequence[Bundle | Prompt]) -> Iterator[bytes]:
    """16 bytes for each row, equal for rows of equal tokens, labels and margins."""
    if isinstance(rows, StoredBundles):
        return rows.contents()
    if isinstance(rows, Joined):
        return chain.from_iterable(map(contents, rows.parts))
    return map(_content, rows)


def _content(row: Bundle | Prompt) -> bytes:
    if isinstance(row, Bundle):
        parts = [row.prompt, *row.completions, *row.rows.values()]
    else:
        parts = [row.ids]
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(f"{len(part)}:".encode())
        numbers = part if part.is_floating_point() else part.to(torch.int64)
        digest.update(numbers.contiguous().numpy().tobytes())
    return digest.digest()


def trained_on(bundle: Bundle) -> bytes:
    """What is trained on in a bundle, to be hashed."""
    labels = [bundle.rows[name] for name in sorted(bundle.rows)]
    parts = []
    for tensor in (bundle.prompt, *bundle.completions, *bundle.masks, *labels):
        parts += [f"{tensor.dtype}{tuple(tensor.shape)}".encode(), tensor.numpy().tobytes()]
    return b"".join(parts)
