"""Tensors in safetensors files, read in parts: a process reads the slice that it holds, and nothing
else of the tensor.

A tensor lies whole in one file, as in a folder of Hugging Face's, or in rectangles in several, as a
checkpoint of several processes has it. The rectangles' offsets stand in each file's metadata, in the
layout of torch.distributed.checkpoint, whose reader understands these files too.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

INDEX = "DCP_SHARDING_INFO"
OFFSETS = "saved_offsets"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Region:
    """A rectangle of a tensor: where it begins in each dimension, and how long it is there."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Region":
        """The part of a tensor that this process holds."""
        if not isinstance(tensor, DTensor):
            return cls((0,) * tensor.dim(), tuple(tensor.shape))
        shape, offsets = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        return cls(tuple(offsets), tuple(shape))

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it, as on a process that holds no row."""
        return 0 in self.shape

    def overlap(self, other: "Region") -> "Region":
        """What both rectangles cover."""
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = map(min, self._ends(), other._ends())
        shape = tuple(max(0, end - start) for start, end in zip(starts, ends))
        return Region(starts, shape)

    def within(self, other: "Region") -> tuple[slice, ...]:
        """The slices of the rectangle `other` that give this one."""
        starts = [own - theirs for own, theirs in zip(self.offsets, other.offsets)]
        return tuple(slice(start, start + n) for start, n in zip(starts, self.shape))

    def _ends(self) -> Iterator[int]:
        return (offset + n for offset, n in zip(self.offsets, self.shape))


class Stored:
    """One tensor on disk, whole or in rectangles."""

    def __init__(self, name: str, pieces: list[tuple[Any, Region]], dtype: torch.dtype) -> None:
        self.name = name
        self.pieces = pieces  # an open file, and the rectangle that lies in it
        self.dtype = dtype
        ends = [tuple(region._ends()) for _, region in pieces]
        self.shape = torch.Size(map(max, *ends)) if len(ends) > 1 else torch.Size(ends[0])

    def read_into(self, target: Tensor) -> None:
        """Copy this process's part into `target`, a shard or a whole tensor of the same shape."""
        part = target.to_local() if isinstance(target, DTensor) else target
        self.read_region(Region.of(target), part)

    @torch.no_grad()
    def read_region(self, wanted: Region, into: Tensor) -> None:
        """Copy the rectangle `wanted` into a tensor of its shape. ValueError where the files hold
        only a part of it.
        """
        if wanted.is_empty:
            return
        read = 0
        for file, region in self.pieces:
            common = wanted.overlap(region)
            if common.is_empty:
                continue
            values = file.get_slice(self.name)
            # a tensor without dimensions has no slices
            content = values[common.within(region)] if common.shape else values[...]
            into[common.within(wanted)].copy_(content) if common.shape else into.copy_(content)
            read += content.numel()
        if read != into.numel():
            raise ValueError(f"{self.name}: the files hold {read} of {into.numel()} elements")

    def whole(self) -> Tensor:
        """The whole tensor, in memory."""
        value = torch.empty(self.shape, dtype=self.dtype)
        self.read_region(Region((0,) * len(self.shape), tuple(self.shape)), value)
        return value


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of some safetensors files. `stored` names one that is read in parts; as a mapping
    it gives whole tensors, read when they are asked for.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        pieces: dict[str, list[tuple[Any, Region]]] = {}
        dtypes: dict[str, torch.dtype] = {}
        for path in files:
            file: Any = safe_open(path, framework="pt")
            index = json.loads((file.metadata() or {}).get(INDEX, "{}"))
            for name in file.keys():  # noqa: SIM118  the handle is no mapping
                header = file.get_slice(name)
                shape = tuple(header.get_shape())
                offsets = tuple(index[name][OFFSETS]) if name in index else (0,) * len(shape)
                pieces.setdefault(name, []).append((file, Region(offsets, shape)))
                dtypes[name] = DTYPES.get(header.get_dtype(), torch.float32)
        self.by_name = {name: Stored(name, parts, dtypes[name]) for name, parts in pieces.items()}

    def stored(self, name: str) -> Stored:
        """One tensor as it lies on disk."""
        return self.by_name[name]

    def __getitem__(self, name: str) -> Tensor:
        return self.by_name[name].whole()

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)


def save_parts(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write this process's parts of some tensors, with the place of each in its tensor. Parts that
    are empty, or that another process writes as well, are left out.
    """
    parts: dict[str, Tensor] = {}
    index: dict[str, Any] = {}
    for name, tensor in tensors.items():
        region = Region.of(tensor)
        if region.is_empty or not _is_first_copy(tensor):
            continue
        if isinstance(tensor, DTensor):
            part = tensor.to_local().detach()  # not copied: it may be large
        else:
            part = tensor.detach().clone()  # safetensors refuses views that share memory
        parts[name] = part.cpu().contiguous()
        index[name] = {OFFSETS: list(region.offsets)}
    save_file(
        parts, file, metadata={"format": "pt", "DCP_VERSION": "1.0", INDEX: json.dumps(index)}
    )


def _is_first_copy(tensor: Tensor) -> bool:
    """Whether no process before this one holds the same part."""
    if not isinstance(tensor, DTensor):
        return True
    place = tensor.device_mesh.get_coordinate()
    assert place is not None
    copies = zip(place, tensor.placements)
    return not any(at for at, placement in copies if placement.is_replicate())
