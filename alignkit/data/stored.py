"""Bundles on disk: an Arrow file that is mapped into memory, of which a run touches the rows that it
trains on.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b, sha256
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, Self, TypeAlias, overload

import numpy as np
import pyarrow as pa
import torch

from alignkit.batches import Bundle
from alignkit.data.prompts import Prompt
from alignkit.data.tokenise import Cut
from alignkit.policies.lazy import Joined, Selected

_Array: TypeAlias = np.ndarray[Any, Any]

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


def pack(cuts: Sequence[Cut]) -> Packed:
    """Examples as the bundles of a file. There may be millions of them, so that nothing is made of
    a single one but what is hashed.
    """
    if not cuts:
        return Packed(pa.RecordBatch.from_pylist([], SCHEMA), b"")

    texts = [[cut.prompt, *cut.completions] for cut in cuts]
    ids, ids_ends = _joined(texts, np.int64)
    mask, mask_ends = _joined([cut.masks for cut in cuts], np.bool_)
    contents = []
    hashed: list[bytes | memoryview] = []

    for cut, own_ids, own_mask in zip(cuts, _rows(ids, ids_ends), _rows(mask, mask_ends)):
        parts = _split(own_ids, [cut.prompt, *cut.completions])
        values = list(_values(cut).values())
        contents.append(_content([*parts, *values]))
        hashed += _trained_on([*parts, *_split(own_mask, cut.masks), *values])

    labels = [None if cut.label is None else int(cut.label) for cut in cuts]
    columns = [
        pa.ListArray.from_arrays(ids_ends, pa.array(ids.astype(np.int32))),
        pa.ListArray.from_arrays(mask_ends, pa.array(mask.view(np.uint8))),
        pa.array([list(map(len, parts)) for parts in texts], SCHEMA.field("lengths").type),
        pa.array(labels, pa.int8()),
        pa.array([cut.margin for cut in cuts], pa.float64()),
        pa.array([cut.uid for cut in cuts], pa.string()),
        pa.array(contents, pa.binary(16)),
    ]
    return Packed(pa.record_batch(columns, schema=SCHEMA), b"".join(hashed))


def bundles_of(cuts: Sequence[Cut]) -> list[Bundle]:
    """Examples as bundles in memory."""
    ids, ids_ends = _joined([[cut.prompt, *cut.completions] for cut in cuts], np.int64)
    mask, mask_ends = _joined([cut.masks for cut in cuts], np.bool_)

    bundles = []
    for cut, own_ids, own_mask in zip(cuts, _rows(ids, ids_ends), _rows(mask, mask_ends)):
        prompt, *completions = map(
            torch.from_numpy, _split(own_ids, [cut.prompt, *cut.completions])
        )
        masks = list(map(torch.from_numpy, _split(own_mask, cut.masks)))
        rows = {name: torch.from_numpy(value) for name, value in _values(cut).items()}
        bundles.append(Bundle(prompt, completions, masks, cut.uid, rows))
    return bundles


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


def _values(cut: Cut) -> dict[str, _Array]:
    """The label and the margin of an example, where it has them."""
    values: dict[str, _Array] = {}
    if cut.label is not None:
        values["label"] = np.array([cut.label])
    if cut.margin is not None:
        values["margin"] = np.array([cut.margin], np.float64)
    return values


def _joined(rows: Sequence[Sequence[Sequence[int]]], dtype: Any) -> tuple[_Array, _Array]:
    """The numbers of all parts of all rows one behind the other, and where each row ends, after a 0."""
    lengths = [sum(map(len, parts)) for parts in rows]
    ends = np.cumsum([0, *lengths], dtype=np.int32)
    numbers = chain.from_iterable(chain.from_iterable(rows))
    return np.fromiter(numbers, dtype, count=int(ends[-1])), ends


def _rows(values: _Array, ends: _Array) -> Iterator[_Array]:
    """The part of `values` that each row has."""
    return (values[begin:end] for begin, end in pairwise(ends.tolist()))


def _split(values: _Array, parts: Sequence[Sequence[int]]) -> list[_Array]:
    """`values` as arrays as long as each of `parts`."""
    ends = accumulate(map(len, parts), initial=0)
    return [values[begin:end] for begin, end in pairwise(ends)]


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
    return (_content(_content_arrays(row)) for row in rows)


def _content_arrays(row: Bundle | Prompt) -> list[_Array]:
    if not isinstance(row, Bundle):
        return [row.ids.numpy()]
    return [part.numpy() for part in (row.prompt, *row.completions, *row.rows.values())]


def _content(parts: Sequence[_Array]) -> bytes:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(f"{len(part)}:".encode())
        numbers = part if part.dtype.kind == "f" else part.astype(np.int64, copy=False)
        digest.update(np.ascontiguousarray(numbers).data)
    return digest.digest()


def trained_on(bundle: Bundle) -> bytes:
    """What is trained on in a bundle, to be hashed."""
    labels = [bundle.rows[name] for name in sorted(bundle.rows)]
    tensors = (bundle.prompt, *bundle.completions, *bundle.masks, *labels)
    return b"".join(_trained_on([tensor.numpy() for tensor in tensors]))


def _trained_on(parts: Sequence[_Array]) -> Iterator[bytes | memoryview]:
    for part in parts:
        yield f"torch.{_name(part.dtype)}({len(part)},)".encode()
        yield np.ascontiguousarray(part).data


@cache
def _name(dtype: Any) -> str:
    """numpy takes longer to spell it than everything else takes for a row."""
    return str(dtype)
