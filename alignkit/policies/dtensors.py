"""Tensors that may be shards: their whole, this process's part, and a value laid out as one is."""

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a shard (every process has to ask); any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a shard; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole `value` laid out as `target` is: this process's shard of it, where that is one."""
    if not isinstance(target, DTensor) or isinstance(value, DTensor) or value.shape != target.shape:
        return value
    moved = value.to(target.device, target.dtype)
    return distribute_tensor(moved, target.device_mesh, target.placements)


def cloned(state: Mapping[str, object]) -> dict[str, object]:
    """A copy of an optimiser's state of one parameter."""
    return {
        key: value.detach().clone() if isinstance(value, Tensor) else value
        for key, value in state.items()
    }
