"""A checkpoint that several processes write together, each its own shards.

It exists when the last process's file is whole: all of them write into a folder that nobody else
sees, the first one then writes the manifest over all files, and one rename lets it appear.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from alignkit import files
from alignkit.distributed.errors import raise_on_all_ranks
from alignkit.policies.slices import save_parts
from alignkit.training import checkpoint


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    identity: Mapping[str, Any],
    accelerator: Accelerator,
) -> Path:
    """`checkpoint.save` by all processes: `folder/step-N`. Raises CheckpointError on all of them
    where the disk refuses one; older checkpoints stay whole.

    The processes must see one file system. What is no shard is written by the first process.
    """
    final = folder / f"step-{step}"
    temporary = final.with_name(f".tmp-{final.name}")
    main = accelerator.is_main_process
    try:
        with raise_on_all_ranks(accelerator), checkpoint.explained(folder, step):
            if main:
                files.begun_folder(final)

        own: list[Path] = []
        with raise_on_all_ranks(accelerator), checkpoint.explained(folder, step):
            own = _write_own(temporary, tensors, accelerator)
            hashes = dict(zip((file.name for file in own), files.sha256_of_files(own)))
        everyone = gather_object([hashes])

        with raise_on_all_ranks(accelerator), checkpoint.explained(folder, step):
            if main:
                (temporary / checkpoint.STATE).write_text(json.dumps(state))
                known = {name: value for part in everyone for name, value in part.items()}
                content = {"step": step, **checkpoint.manifest_content(identity)}
                files.write_manifest(temporary, content, hashes=known)
                files.fsync(temporary / checkpoint.STATE)
                files.fsync(temporary / files.MANIFEST)
                files.appear(temporary, final)
                files.fsync(folder.parent)  # `folder` itself may be new
    finally:
        if main:
            files.abandon_folder(final)
    return final


def _write_own(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], accelerator: Accelerator
) -> list[Path]:
    """Write this process's part of each group, synced; its files."""
    number = f"{accelerator.process_index + 1:05d}-of-{accelerator.num_processes:05d}"
    written = []
    for group, content in tensors.items():
        own = {
            name: tensor
            for name, tensor in content.items()
            if isinstance(tensor, DTensor) or accelerator.is_main_process
        }
        if own:
            file = folder / f"{group}-{number}.safetensors"
            save_parts(own, file)
            files.fsync(file)
            written.append(file)
    return written
