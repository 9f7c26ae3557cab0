"""Weights spread over the processes by torch's `fully_shard` (FSDP2).

Each process holds a shard of every parameter. Sampling, saving and checkpoints need parameters
whole: `whole` and `gathered` make them so, and every process has to take part.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from alignkit.errors import ConfigError
from alignkit.policies.module import PolicyModule, causal_lm


def shard(module: PolicyModule, processes: int) -> None:
    """Shard parameters, gradients and with them the optimiser's moments over all processes: the
    model's blocks one by one, then the rest.

    From here on only the module's forward may use the parameters, except inside `whole`.
    """
    mesh = init_device_mesh(next(module.parameters()).device.type, (processes,))
    language_model = causal_lm(module.model)
    names = set(getattr(language_model, "_no_split_modules", None) or ())
    blocks = [m for m in language_model.modules() if type(m).__name__ in names]
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)

    # The root is sharded again after its forward too, against torch's default: what a forward
    # without gradient left whole would be stale after the next update.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)

    # The order in which backward gathers blocks is fixed here. Torch would record it from the
    # forwards, which may differ between processes when they sample in between.
    for later, earlier in zip([module, *blocks[::-1]], [*blocks[::-1], *blocks[:1]]):
        later.set_modules_to_backward_prefetch([earlier])


def is_sharded(module: nn.Module) -> bool:
    """Whether every trainable parameter is a shard."""
    return all(isinstance(p, DTensor) for p in module.parameters() if p.requires_grad)


def check_launch(accelerator: Any) -> None:
    """ConfigError for launchers whose optimiser states alignkit cannot checkpoint."""
    if str(accelerator.distributed_type).endswith(("DEEPSPEED", "MEGATRON_LM")):
        raise ConfigError(
            "accelerate was launched for DeepSpeed or Megatron, which alignkit cannot checkpoint; "
            "use train.shard"
        )


def check_sharded(module: nn.Module) -> None:
    """ConfigError where accelerate was launched for FSDP but silently left the policy unsharded."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not is_sharded(module):
        raise ConfigError(
            "accelerate was launched for FSDP but did not shard the policy (it does not on CPUs, "
            "nor with FSDP version 1); set train.shard=true and launch without FSDP, or set "
            "fsdp_version: 2"
        )


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside the block every parameter is whole on every process, however often its parts are
    called. A module without shards stays as it is.
    """
    parts = [m for m in module.modules() if isinstance(m, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def full(tensor: Tensor) -> Tensor:
    """The whole of a shard (every process has to ask); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a shard; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole copies of tensors and shards, on the CPU.

    Every process has to take part; one without `keep` gets an empty dict.
    """
    copies = {}
    for name, tensor in tensors.items():
        complete = full(tensor.detach())
        if keep:
            copies[name] = complete.cpu().clone()
    return copies


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole `value` laid out as `target` is: this process's shard of it, where that is one."""
    if not isinstance(target, DTensor) or isinstance(value, DTensor) or value.shape != target.shape:
        return value
    moved = value.to(target.device, target.dtype)
    return distribute_tensor(moved, target.device_mesh, target.placements)


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole `value` into `target`, sharded or not."""
    target.copy_(like(value, target))
