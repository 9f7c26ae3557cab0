"""Writing a model whose weights are spread over the processes, or lie in a checkpoint: tensor by
tensor, so that it is never whole in memory.

The result is what transformers' `save_pretrained` writes: safetensors files with an index, names
and conversions turned back into those of the model's own files.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    rename_source_key,
    revert_weight_conversion,
)

from alignkit.files import write_json
from alignkit.policies.dtensors import full, local
from alignkit.policies.export import note_dtype, save_adapter
from alignkit.policies.slices import DTYPES

log = logging.getLogger("alignkit")

FILE_BYTES = 4 << 30  # of one safetensors file
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@torch.no_grad()
def save_sharded(model: Any, folder: Path, dtype: torch.dtype | None, *, writes: bool) -> None:
    """`save_model` of shards: all processes call it, and write the files in turn. The one with
    `writes` adds the config. What goes wrong on one of them is raised at its end, after it has
    taken part in everything.
    """
    if hasattr(model, "peft_config"):
        adapter = _adapter_state(model)
        if writes:
            save_adapter(model, folder, adapter)
        return

    live = live_tensors(model)
    dtype = _fitting(live, dtype or model.dtype)
    shapes = {name: _like(tensor, dtype) for name, tensor in live.items()}
    plan = plan_files(model, shapes)
    failure: Exception | None = None
    try:
        if writes:
            save_config(model, folder, dtype, plan)
    except Exception as error:
        failure = error

    rank, world = dist.get_rank(), dist.get_world_size()
    for number, file in enumerate(plan):
        mine = number % world == rank and failure is None
        refusal = write_file(
            model, folder, file, lambda name: full(live[name]).to(shapes[name].dtype), writes=mine
        )
        failure = failure or refusal
    if failure is not None:
        raise failure


def _adapter_state(model: Any) -> dict[str, Tensor]:
    """Whole copies of what the trained adapter consists of."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {
        name: full(value).cpu()
        for name, value in model.state_dict().items()
        if name in trained or not isinstance(value, DTensor)
    }


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and lasting buffers of a model as they are, tied ones once."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                tensors[f"{path}.{name}".lstrip(".")] = buffer
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _fitting(live: Mapping[str, Tensor], dtype: torch.dtype) -> torch.dtype:
    """The dtype to save in: float32 in place of a float16 that some weight is too large for."""
    if dtype is not torch.float16:
        return dtype
    parts = [local(tensor) for tensor in live.values() if tensor.is_floating_point()]
    fits = torch.tensor(all(bool(part.to(dtype).isfinite().all()) for part in parts)).int()
    fits = fits.to(parts[0].device)
    dist.all_reduce(fits, dist.ReduceOp.MIN)
    if int(fits):
        return dtype
    log.warning("some weights are too large for float16; the model is saved in float32")
    return torch.float32


def _like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the same shape without content, as it is saved."""
    kind = dtype if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=kind, device="meta")


@dataclass
class PlannedFile:
    """One safetensors file: which tensors of the model make which tensors of the file."""

    name: str
    groups: list[list[str]] = field(default_factory=list)
    shapes: dict[str, Tensor] = field(default_factory=dict)  # on the meta device, in order


def plan_files(model: Any, shapes: Mapping[str, Tensor]) -> list[PlannedFile]:
    """Which file holds what; `shapes` are tensors without content under the model's names."""
    files = [PlannedFile("")]
    size = 0
    for group in converted_together(model, list(shapes)):
        made = revert_weight_conversion(model, {name: shapes[name] for name in group})
        own = sum(tensor.nbytes for tensor in made.values())
        if size and size + own > FILE_BYTES:
            files.append(PlannedFile(""))
            size = 0
        size += own
        files[-1].groups.append(group)
        files[-1].shapes |= made

    for number, file in enumerate(files, 1):
        several = len(files) > 1
        file.name = f"model-{number:05d}-of-{len(files):05d}" if several else "model"
        file.name += ".safetensors"
    return files


def converted_together(model: Any, names: Sequence[str]) -> list[list[str]]:
    """The names that are converted together, such as the projections of one stacked tensor."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    backwards = [conversion.reverse_transform() for conversion in conversions[::-1]]
    converters = [entry for entry in backwards if isinstance(entry, WeightConverter)]

    groups: dict[str, list[str]] = {}
    for name in names:
        renamed, pattern = rename_source_key(name, [], converters)
        groups.setdefault(name if pattern is None else renamed, []).append(name)
    return list(groups.values())


def save_config(model: Any, folder: Path, dtype: torch.dtype, plan: Sequence[PlannedFile]) -> None:
    """Everything of a saved model but its weights: config, generation config, code of its own, and
    the index where there are several files.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as aside:
        # transformers knows what belongs to a model; it is given one small tensor in place of all.
        model.save_pretrained(aside, state_dict={"nothing": torch.zeros(1)})
        for file in Path(aside).iterdir():
            if file.suffix != ".safetensors":
                shutil.move(file, folder / file.name)
    note_dtype(folder, dtype)

    if len(plan) > 1:
        total = sum(tensor.nbytes for file in plan for tensor in file.shapes.values())
        weight_map = {name: file.name for file in plan for name in file.shapes}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index, indent=2)


def write_file(
    model: Any,
    folder: Path,
    file: PlannedFile,
    tensor: Callable[[str], Tensor],
    *,
    writes: bool,
) -> Exception | None:
    """Write one file tensor by tensor. `tensor` gives one of the model's tensors whole; it is asked
    for all of them even where nothing is written, as other processes need this one's part. What the
    disk refuses is returned.
    """
    failure: Exception | None = None
    opened: BinaryIO | None = None
    try:
        opened = begun(folder / file.name, file.shapes) if writes else None
    except OSError as error:
        failure = error

    for group in file.groups:
        content = {name: tensor(name) for name in group}
        if opened is None or failure is not None:
            continue
        try:
            for value in revert_weight_conversion(model, content).values():
                append(opened, value)
        except OSError as error:
            failure = error

    if opened is not None:
        opened.close()
    return failure


def begun(path: Path, shapes: Mapping[str, Tensor]) -> BinaryIO:
    """A safetensors file with its header, ready for the tensors' bytes in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in shapes.items():
        end = position + tensor.nbytes
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    file = path.open("wb")
    file.write(len(text).to_bytes(8, "little") + text)
    return file


def append(file: BinaryIO, tensor: Tensor) -> None:
    """Write the bytes of the next tensor that the header of `begun` names."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    file.write(content.numpy().data)
