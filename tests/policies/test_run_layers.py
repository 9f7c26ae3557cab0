"""Layers of packed rows against transformers' own, in what they give and in their gradients."""

import copy
import io

import pytest
import torch
from tiny_models import random_bundles, tiny_model
from transformers.models.llama.modeling_llama import LlamaMLP

from alignkit.policies import module as module_file
from alignkit.policies import run_layers
from alignkit.policies.layout import build_rows
from alignkit.policies.module import PolicyModule
from alignkit.policies.run_layers import rms_norm, rotated

WIDE = 10**6
FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]


def figures(module: PolicyModule, rows) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probs of the trained tokens, and the gradient of a weighted sum of them."""
    module.zero_grad()
    logps = module(rows)["policy"]
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return logps.detach(), [p.grad for p in module.parameters()]


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_of_packed_rows_are_transformers_own(name, monkeypatch):
    """The same packed row through transformers' layers: nothing but the layers differs."""
    model = tiny_model(name, initializer_range=0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    rows = build_rows(random_bundles(5, 4, 3, 12), "shared_prefix", packing=WIDE)
    ours = PolicyModule(copy.deepcopy(model))
    assert ours.trims
    monkeypatch.setattr(module_file, "take_over", lambda model: False)
    theirs = PolicyModule(model)
    assert not theirs.trims

    logps, gradients = figures(ours, rows)
    expected, expected_gradients = figures(theirs, rows)
    torch.testing.assert_close(logps, expected, rtol=0, atol=2e-6)
    for own, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=2e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(rows)["policy"], expected, rtol=0, atol=2e-6)


def test_the_last_layer_computes_what_is_read():
    """Of a prompt its last token; and a copy of a model computes with its own weights."""
    module = PolicyModule(tiny_model("llama"))
    rows = build_rows(random_bundles(2, 3, 2, 8), "shared_prefix", packing=WIDE)
    seen = []
    for layer in module.model.model.layers:
        layer.mlp.up_proj.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].shape[1])
        )
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0].shape[1])
        )
    module(rows)
    whole = rows.input_ids.shape[1]
    read = len(rows.sources.unique())
    assert read < whole
    assert seen == [whole, whole, read, read]

    copied = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not torch.allclose(copied(rows)["policy"], module(rows)["policy"])


def test_norm_and_rotation_have_the_gradient_of_their_formulas():
    torch.manual_seed(0)
    norm = tiny_model("llama").model.norm
    x = torch.randn(1, 7, norm.weight.shape[0], dtype=torch.float64, requires_grad=True)
    weight = torch.rand(x.shape[-1], dtype=torch.float64, requires_grad=True)
    found = run_layers._RMSNorm.apply(x, weight, 1e-6)
    formula = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    torch.testing.assert_close(found, formula, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(run_layers._RMSNorm.apply, (x, weight, 1e-6))

    heads = torch.randn(1, 5, 2, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.rand(1, 5, 1, 4, dtype=torch.float64).repeat(1, 1, 1, 2)
    first, second = heads.chunk(2, -1)
    turned = heads * angles.cos() + torch.cat((-second, first), -1) * angles.sin()
    torch.testing.assert_close(
        rotated(heads, angles.cos(), angles.sin()), turned, rtol=0, atol=1e-12
    )
    assert torch.autograd.gradcheck(lambda h: rotated(h, angles.cos(), angles.sin()), (heads,))

    # A norm of another kind, or in another dtype, is left to itself.
    half = torch.randn(2, norm.weight.shape[0]).bfloat16()
    assert torch.equal(rms_norm(norm, half), norm(half))
    plain = torch.nn.LayerNorm(4)
    assert torch.equal(rms_norm(plain, half[:, :4].float()), plain(half[:, :4].float()))


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointed_layers_are_computed_again_in_backward(name):
    """Once in forward, once in backward, with the same gradients."""
    rows = build_rows(random_bundles(5, 4, 3, 12), "shared_prefix", packing=WIDE)
    calls, found = [], []
    for checkpointing in (False, True):
        model = tiny_model(name)
        if checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        module = PolicyModule(model).train()
        assert module.trims
        count = []
        for layer in model.model.layers:
            layer.mlp.up_proj.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        found.append(figures(module, rows))
        calls.append(len(count) / len(model.model.layers))

    assert calls == [1, 2]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


class HalfMLP(LlamaMLP):
    def forward(self, x):
        return 0.5 * super().forward(x)


class Wrapper(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 0.5 * self.inner(x)


def hooked(layer):
    layer.mlp.register_forward_hook(lambda _, inputs, output: 0.5 * output)


def hooked_norm(layer):
    layer.input_layernorm.register_forward_hook(lambda _, inputs, output: 0.5 * output)


def subclassed(layer):
    layer.mlp.__class__ = HalfMLP


def patched_mlp(layer):
    old = layer.mlp.forward
    layer.mlp.forward = lambda x: 0.5 * old(x)


def wrapped(layer):
    layer.mlp = Wrapper(layer.mlp)


def patched_attention(layer):
    old = layer.self_attn.forward
    layer.self_attn.forward = lambda *args, **options: (0.5 * old(*args, **options)[0], None)


def patched_layer(layer):
    old = layer.forward
    layer.forward = lambda *args, **options: 0.5 * old(*args, **options)


CHANGES = [
    hooked,
    hooked_norm,
    subclassed,
    patched_mlp,
    wrapped,
    patched_attention,
    patched_layer,
]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_somebody_changed_in_a_model_has_its_effect(change, late, monkeypatch):
    """Before alignkit has the model or after: packed rows compute what transformers computes."""
    rows = build_rows(random_bundles(5, 4, 3, 12), "shared_prefix", packing=WIDE)
    model = tiny_model("llama", initializer_range=0.1)
    expected = copy.deepcopy(model)
    untouched = PolicyModule(copy.deepcopy(model))(rows)["policy"].detach()
    ours = None
    if late:
        ours = PolicyModule(model)
    for layer in model.model.layers:
        change(layer)
    found, gradients = figures(ours or PolicyModule(model), rows)

    monkeypatch.setattr(module_file, "take_over", lambda model: False)
    for layer in expected.model.layers:
        change(layer)
    plain, plain_gradients = figures(PolicyModule(expected), rows)
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-6)
    assert (found - untouched).abs().max() > 1e-3
    for own, other in zip(gradients, plain_gradients, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=2e-5)


def test_a_model_can_be_saved_whole_and_hooks_keep_what_they_saw():
    rows = build_rows(random_bundles(5, 4, 3, 12), "shared_prefix", packing=WIDE)
    module = PolicyModule(tiny_model("llama"))
    file = io.BytesIO()
    torch.save(module.model, file)
    file.seek(0)
    again = PolicyModule(torch.load(file, weights_only=False))
    assert again.trims
    expected = module(rows)["policy"]
    torch.testing.assert_close(again(rows)["policy"], expected, rtol=0, atol=0)

    kept = []
    for layer in module.model.model.layers:
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.register_forward_hook(lambda _, inputs, out: kept.append((out, out.clone())))
    with torch.no_grad():
        module(rows)
    assert len(kept) == 4
    for output, at_the_time in kept:
        assert torch.equal(output, at_the_time)


def test_the_gate_of_an_mlp_keeps_its_two_operands_alone():
    gate, up = (torch.randn(5, 7, requires_grad=True) for _ in range(2))
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        inner = run_layers._gated(torch.nn.SiLU(), gate, up)
    assert len(kept) == 2

    # Against the formula, in value and gradient.
    wide_gate, wide_up = (x.detach().double().requires_grad_() for x in (gate, up))
    wide = wide_gate * torch.sigmoid(wide_gate) * wide_up
    inner.square().sum().backward()
    wide.square().sum().backward()
    for found, wanted in ((inner, wide), (gate.grad, wide_gate.grad), (up.grad, wide_up.grad)):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
