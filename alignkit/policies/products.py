"""The product of a linear layer on a CPU, forward and back, by oneDNN.

torch multiplies float32 matrices with MKL, which on processors of other makers than its own reaches
less of the machine's speed than oneDNN does, and with a wide output much less. oneDNN also reads a
transposed weight where it lies, so that the gradient of the input is such a product too. The
gradient of the weight is not: MKL is as fast there.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")
)


def product(layer: nn.Module, inputs: Tensor) -> Tensor:
    """What `layer(inputs)` gives, [..., K] -> [..., N]: by oneDNN where it is a linear layer on a
    CPU in float32 that nobody has changed.
    """
    if not _is_plain(layer, inputs):
        given: Tensor = layer(inputs)
        return given
    multiplied: Tensor = _Product.apply(inputs, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return multiplied


def is_untouched(module: nn.Module) -> bool:
    """Whether to call a module is to compute what its class does: no hooks, no forward of its own."""
    state = vars(module)
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return "forward" not in state and not any(state.get(name) for name in hooks)


def multiply(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs weight^T + bias, [..., K], [N, K] (packed or not), [N] -> [..., N]; no gradient."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return result


def _is_plain(layer: nn.Module, inputs: Tensor) -> TypeGuard[nn.Linear]:
    """Whether oneDNN can compute a layer's product in its stead."""
    if type(layer) is not nn.Linear or not is_untouched(layer):
        return False
    # A shard of a weight is no parameter of its own kind.
    weight = layer.weight
    is_float32 = weight.dtype == inputs.dtype == torch.float32
    on_cpu = weight.device.type == inputs.device.type == "cpu"
    narrowed = torch.is_autocast_enabled("cpu")
    return ONEDNN and type(weight) is nn.Parameter and is_float32 and on_cpu and not narrowed


class _Product(torch.autograd.Function):
    """x W^T + b, [..., K] -> [..., N]."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return multiply(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        of_inputs, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            multiply(grad, weight.t()) if of_inputs else None,
            rows.T @ inputs.reshape(-1, inputs.shape[-1]) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )
