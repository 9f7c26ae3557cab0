"""Linear layers by oneDNN: what the layer itself gives, forward and back, and the layer itself where
somebody has changed it.
"""

import pytest
import torch
from torch import nn

from alignkit.policies import products
from alignkit.policies.products import ONEDNN, product

if not ONEDNN:
    pytest.skip("oneDNN does not multiply on this processor", allow_module_level=True)


def linear(bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 80, bias=bias)


def gradients(multiply, layer: nn.Linear, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and the gradients of a sum of it with fixed weights."""
    leaf = inputs.clone().requires_grad_()
    layer.zero_grad()
    output = multiply(layer, leaf)
    weights = torch.arange(output.numel(), dtype=output.dtype).reshape(output.shape).cos()
    (output * weights).sum().backward()
    found = {"output": output.detach(), "inputs": leaf.grad}
    return found | {name: p.grad for name, p in layer.named_parameters()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(37, 48), (1, 37, 48), (3, 5, 48), (1, 48), (0, 48)])
def test_values_and_gradients_are_those_of_the_layer_in_float64(shape, bias):
    layer = linear(bias)
    inputs = torch.randn(shape)
    found = gradients(product, layer, inputs)
    wanted = gradients(lambda each, x: each(x), linear(bias).double(), inputs.double())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value, rtol=0, atol=1e-5, msg=name)


def test_a_frozen_weight_gets_no_gradient():
    layer = linear().requires_grad_(False)
    inputs = torch.randn(4, 48, requires_grad=True)
    product(layer, inputs).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(inputs.grad[0], layer.weight.sum(0))


def test_a_second_derivative_is_refused():
    layer = linear()
    inputs = torch.randn(4, 48, requires_grad=True)
    first = torch.autograd.grad(product(layer, inputs).square().sum(), inputs, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


class Louder(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


def hooked() -> nn.Module:
    layer = linear()
    layer.register_forward_hook(lambda module, given, output: 2 * output)
    return layer


def rewritten() -> nn.Module:
    layer = linear()
    layer.forward = lambda inputs: 2 * nn.functional.linear(inputs, layer.weight)
    return layer


@pytest.mark.parametrize(
    "changed", [hooked, rewritten, lambda: Louder(48, 80)], ids=["hook", "forward", "class"]
)
def test_what_somebody_changed_has_its_effect(changed):
    layer = changed()
    inputs = torch.randn(4, 48)
    plain = 2 * nn.functional.linear(inputs, layer.weight, layer.bias)
    torch.testing.assert_close(product(layer, inputs), plain)


@pytest.mark.parametrize("case", ["float64", "autocast"])
def test_other_dtypes_are_the_layers_own(case, monkeypatch):
    monkeypatch.setattr(products, "multiply", None)  # it is not called
    layer = linear()
    inputs = torch.randn(4, 48)
    if case == "float64":
        assert product(layer.double(), inputs.double()).dtype == torch.float64
        return
    with torch.autocast("cpu", torch.bfloat16):
        assert product(layer, inputs).dtype == torch.bfloat16
