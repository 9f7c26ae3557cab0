"""Weights sharded over the processes by torch's `fully_shard` (FSDP2), and made whole where
something needs them whole.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from alignkit.errors import ConfigError
from alignkit.policies.module import PolicyModule, causal_lm


def shard(module: PolicyModule, processes: int) -> None:
    """Shard parameters, gradients and (through them) moments over all processes: the model's blocks
    one by one, then the rest.

    The module's forward is the only way in from here on, except inside `whole`.
    """
    mesh = init_device_mesh(next(module.parameters()).device.type, (processes,))
    language_model = causal_lm(module.model)
    names = set(getattr(language_model, "_no_split_modules", None) or ())
    blocks = [m for m in language_model.modules() if type(m).__name__ in names]
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # the root too, against torch's default: what a forward without gradient left whole would be
    # stale after the next update
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # the order of gathering in backward is said, not recorded: what processes sample in between may
    # differ between them
    for later, earlier in zip([module, *blocks[::-1]], [*blocks[::-1], *blocks[:1]]):
        later.set_modules_to_backward_prefetch([earlier])


def is_sharded(module: nn.Module) -> bool:
    """Whether every trainable parameter is a shard."""
    return all(isinstance(p, DTensor) for p in module.parameters() if p.requires_grad)


def check_launch(accelerator) -> None:
    """ConfigError for launchers whose states no checkpoint of ours can gather."""
    if str(accelerator.distributed_type).endswith(("DEEPSPEED", "MEGATRON_LM")):
        raise ConfigError(
            "accelerate was launched for DeepSpeed or Megatron, which alignkit cannot checkpoint; use train.shard"
        )


def check_sharded(module: nn.Module) -> None:
    """ConfigError where accelerate was asked for shards and wrapped the policy otherwise, without a
    word.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not is_sharded(module):
        raise ConfigError(
            "accelerate was launched for FSDP but did not shard the policy (it does not on CPUs, nor with FSDP version 1); "
            "set train.shard=true and launch without FSDP, or set fsdp_version: 2"
        )


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Every parameter whole on every process, however often its parts are called; nothing to do for
    a module without shards.
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
    """Whole copies on the CPU of tensors and shards; without `keep` only the part in the gathering,
    and nothing to return.
    """
    found = {}
    for name, tensor in tensors.items():
        complete = full(tensor.detach())
        if keep:
            found[name] = complete.cpu().clone()
    return found


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
