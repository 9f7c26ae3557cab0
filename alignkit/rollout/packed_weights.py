"""Matrix products with weights packed beforehand, for sampling on a CPU.

A sampling step multiplies few rows with every weight. Called plainly, the product packs the weight
anew each time, which for a dozen rows takes as long as the multiplication and for one row far
longer; oneDNN takes weights that are packed already.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SMALLEST = 1 << 16  # elements of a weight below which packing gains nothing
ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")
)

# Layers of one module that transformers' models hand the same input, one after the other.
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class PackedWeights:
    """A model's large linear layers, packed as its weights are
    now, in the dtype that autocast computes in. Those with the same input are one product.

    Rows of one token are multiplied with them, [R, 1, K]; longer ones by the layers themselves.

    They take the weights' memory once more. Layers stay as they are where oneDNN does not compute
    the product: on another device or processor, or in another dtype.
    """

    def __init__(self, model: nn.Module) -> None:
        self._forwards: dict[nn.Module, partial[Tensor]] = {}
        for layers in _groups(model):
            product = _Product(layers)
            for number, layer in enumerate(layers):
                self._forwards[layer] = partial(product, number)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, these layers multiply with the packed weights; there is no gradient.

        A layer that has a forward of its own by then is left alone: somebody has wrapped it, or it
        is in use already.
        """
        free = [module for module in self._forwards if "forward" not in vars(module)]
        for module in free:
            module.forward = self._forwards[module]
        try:
            yield
        finally:
            for module in free:
                del module.forward


def _groups(model: nn.Module) -> list[list[nn.Linear]]:
    """The layers that are to be packed, in groups of one product each."""
    layers = dict.fromkeys(module for module in model.modules() if _can_be_packed(module))
    groups = []
    for parent in model.modules():
        for names in TOGETHER:
            group = [layer for name in names if (layer := getattr(parent, name, None)) in layers]
            kinds = {(each.in_features, each.bias is None, each.weight.dtype) for each in group}
            if len(set(group)) == len(names) and len(kinds) == 1:
                groups.append(group)
                for layer in group:
                    del layers[layer]

    groups += [[layer] for layer in layers]
    return [group for group in groups if sum(each.weight.numel() for each in group) >= SMALLEST]


def _can_be_packed(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether oneDNN can compute a layer's product in its stead."""
    if type(module) is not nn.Linear or module.weight.device.type != "cpu":
        return False
    if isinstance(module.weight, DTensor):
        return False  # a shard, which is put together for each forward anew
    # A forward of the instance's own is a wrapper's (offloading, say), which must see every call.
    if "forward" in vars(module):
        return False
    return ONEDNN and _multiplies(_dtype(module))


def _dtype(layer: nn.Linear) -> torch.dtype:
    """The dtype that a layer computes in."""
    autocast = torch.is_autocast_enabled("cpu")
    return torch.get_autocast_dtype("cpu") if autocast else layer.weight.dtype


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in this dtype on this processor."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


class _Product:
    """The product of an input with the weights of some layers, which are asked in their order: the
    first one multiplies for all, the others find their part.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = layers
        dtype = _dtype(layers[0])
        weight = torch.cat([layer.weight.data for layer in layers]).to(dtype)
        biases = [layer.bias.data for layer in layers if layer.bias is not None]
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self.bias = torch.cat(biases).to(dtype) if biases else None
        self.dtype = dtype
        self.sizes = [layer.out_features for layer in layers]
        self.inputs: Tensor | None = None
        self.parts: Sequence[Tensor] = ()

    def __call__(self, number: int, inputs: Tensor) -> Tensor:
        """The output of layer `number`, by the packed weights where there is one token of each row.

        Prompts are left to the layer: oneDNN keeps code for each shape that it has seen, and prompts
        have all kinds of lengths.
        """
        if inputs.dim() != 3 or inputs.shape[1] != 1:
            return nn.Linear.forward(self.layers[number], inputs)
        if number == 0 or inputs is not self.inputs:
            self.inputs = inputs
            self.parts = torch.ops.mkldnn._linear_pointwise(
                inputs.to(self.dtype), self.packed, self.bias, "none", [], ""
            ).split(self.sizes, -1)

        part = self.parts[number]
        if number + 1 == len(self.sizes):
            self.inputs, self.parts = None, ()
        return part
