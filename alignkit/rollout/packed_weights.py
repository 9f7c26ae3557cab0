"""Matrix products with weights packed beforehand, for sampling on a CPU.

A sampling step multiplies few rows with every weight. Called plainly, the product packs the weight
anew each time, which for a dozen rows takes as long as the multiplication and for one row far
longer; oneDNN takes weights that are packed already.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SMALLEST = 1 << 16  # elements of a weight below which packing gains nothing
ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")
)


class PackedWeights:
    """A model's large linear layers, packed as its weights are
    now, in the dtype that autocast computes in.

    They take the weights' memory once more. Layers stay as they are where oneDNN does not compute
    the product: on another device or processor, or in another dtype.
    """

    def __init__(self, model: nn.Module) -> None:
        self._forwards = {
            module: packed for module in model.modules() if (packed := _packed(module)) is not None
        }

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, these layers multiply with the packed weights; there is no gradient."""
        for module, forward in self._forwards.items():
            module.forward = forward
        try:
            yield
        finally:
            for module in self._forwards:
                del module.forward


def _packed(module: nn.Module) -> partial[Tensor] | None:
    """The forward of a linear layer with its weight packed, None for what stays as it is."""
    if type(module) is not nn.Linear or module.weight.numel() < SMALLEST:
        return None
    if isinstance(module.weight, DTensor):
        return None  # a shard, which is put together for each forward anew
    # A forward of the instance's own is a wrapper's (offloading, say), which must see every call.
    if "forward" in vars(module):
        return None

    weight = module.weight.data
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    if weight.device.type != "cpu" or not ONEDNN or not _multiplies(dtype):
        return None

    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous())
    bias = None if module.bias is None else module.bias.data.to(dtype)
    return partial(_product, packed, bias)


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in this dtype on this processor."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _product(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs.to(weight.dtype), weight, bias, "none", [], "")
