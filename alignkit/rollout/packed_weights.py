"""Matrix products with weights packed beforehand, for sampling on a CPU.

A decode step multiplies few rows with every weight. Called plainly, the product packs the weight
anew each time, which for a dozen rows takes as long as the multiplication and for one row far
longer; oneDNN takes weights that are packed already.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

SMALLEST = 1 << 16  # elements of a weight below which packing gains nothing
ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")
)


class PackedWeights:
    """A model's large linear layers, packed as its weights are now, in the dtype that autocast
    computes in.

    They take the weights' memory once more. Empty where the product is not oneDNN's to do: another
    device, processor or dtype.
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
    # a forward of the instance's own is a wrapper's (offloading, say), which must see every call
    if (
        type(module) is not nn.Linear
        or "forward" in vars(module)
        or module.weight.numel() < SMALLEST
    ):
        return None
    weight = module.weight.data
    bias = None if module.bias is None else module.bias.data
    if weight.device.type != "cpu" or not ONEDNN:
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    if dtype != torch.float32 and not (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous())
    return partial(_product, packed, None if bias is None else bias.to(dtype))


def _product(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs.to(weight.dtype), weight, bias, "none", [], "")
