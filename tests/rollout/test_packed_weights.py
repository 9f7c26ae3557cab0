"""Sampling with weights packed beforehand: the same figures, the layers left as they were."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import models_of, small_model
from torch import nn

from alignkit.batches import Draw
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.packed_weights import ONEDNN, PackedWeights

if not ONEDNN:
    pytest.skip("no oneDNN in this torch, or not its processor", allow_module_level=True)

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 320,
    "head_dim": 64,
    "initializer_range": 0.05,
    "init_std": 0.05,
}
IDS = torch.arange(12).view(12, 1) % 7


def wide_model(**changes):
    return small_model(vocab=7, **{**WIDE, **changes})


@torch.no_grad()
def test_products_are_the_same_and_the_layers_are_put_back():
    model = wide_model()
    model.model.layers[0].mlp.down_proj.bias = nn.Parameter(torch.linspace(-1, 1, 256))
    expected, packed = model(IDS).logits, PackedWeights(model)
    with packed.used():
        changed = {name for name, module in model.named_modules() if "forward" in vars(module)}
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=2e-6)
    # the head is small
    assert changed == {
        *(
            f"model.layers.{i}.self_attn.{part}_proj"
            for i in range(2)
            for part in ("q", "k", "v", "o")
        ),
        *(f"model.layers.{i}.mlp.{part}_proj" for i in range(2) for part in ("gate", "up", "down")),
    }
    with pytest.raises(RuntimeError, match="stop"), packed.used():
        raise RuntimeError("stop")
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
def test_a_bias_and_the_dtype_of_autocast():
    layer = nn.Linear(512, 256)
    inputs = torch.randn(3, 1, 512, generator=torch.Generator().manual_seed(0))
    exact = layer(inputs)
    with torch.autocast("cpu", torch.bfloat16), PackedWeights(layer).used():
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            pytest.skip("this processor has no bfloat16 products")
        found = layer(inputs)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=0.02)
    double = nn.Linear(512, 256, dtype=torch.float64)
    with PackedWeights(double).used():
        assert double(inputs.double()).dtype == torch.float64


@torch.no_grad()
def test_a_wrapped_forward_is_left_alone():
    layer, seen = nn.Linear(256, 256), []
    own = layer.forward
    layer.forward = lambda inputs: seen.append(1) or own(inputs)
    with PackedWeights(layer).used():
        layer(torch.ones(1, 256))
    assert seen == [1]
    assert "forward" in vars(layer)


@torch.no_grad()
def test_layers_in_use_already_are_left_as_they_are():
    """Of two that use the same layers one packs, in whichever order they come to their ends."""
    layer = nn.Linear(256, 256)
    inputs = torch.ones(1, 256)
    expected = layer(inputs)
    first, second = PackedWeights(layer), PackedWeights(layer)
    with first.used():
        for again in (first, second):
            with again.used():
                torch.testing.assert_close(layer(inputs), expected, rtol=0, atol=2e-6)
            assert "forward" in vars(layer)
    assert "forward" not in vars(layer)

    one, other = first.used(), second.used()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert torch.equal(layer(inputs), expected)
    other.__exit__(None, None, None)
    assert "forward" not in vars(layer)


@torch.no_grad()
def test_a_forward_that_is_wrapped_after_the_packing_is_left_alone():
    layer, seen = nn.Linear(256, 256), []
    packed = PackedWeights(layer)
    own = layer.forward
    layer.forward = wrapper = lambda inputs: seen.append(1) or own(inputs)
    with packed.used():
        layer(torch.ones(1, 256))
    assert seen == [1]
    assert layer.forward is wrapper


def test_samples_follow_weights_and_adapters_that_move_between_two_calls():
    """What was packed for one call is of no use to the next: the log-probs are always those of the
    weights as they are.
    """
    model = get_peft_model(
        wide_model(),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    sampler = HFSampler(models_of(model.eval()), max_new_tokens=6)
    for _ in range(2):
        sample = sampler.sample([torch.tensor([3, 4])], Draw(1), step=0, prompt_ids=[0])[0][0]
        ids = torch.cat([torch.tensor([3, 4]), sample.ids])[None]
        with torch.no_grad():
            logps = model(ids).logits[0, 1:-1].log_softmax(-1).gather(-1, sample.ids[:, None])[:, 0]
            torch.testing.assert_close(sample.logps, logps, rtol=0, atol=1e-5)
            for name, parameter in model.named_parameters():
                parameter.add_(
                    0.02
                    * torch.randn(
                        parameter.shape, generator=torch.Generator().manual_seed(len(name))
                    )
                )


class Attention(nn.Module):
    """The layers of an attention, which may be given inputs of their own."""

    def __init__(self, bias):
        super().__init__()
        self.q_proj = nn.Linear(256, 256, bias)
        self.k_proj = nn.Linear(256, 64, bias)
        self.v_proj = nn.Linear(256, 64, bias)

    def forward(self, *inputs):
        return [layer(x) for layer, x in zip((self.q_proj, self.k_proj, self.v_proj), inputs)]


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_layers_with_one_input_are_one_product_and_others_have_their_own(bias, monkeypatch):
    attention, products = Attention(bias), []
    x, y = torch.randn(2, 5, 1, 256, generator=torch.Generator().manual_seed(0))
    expected = {inputs: attention(*inputs) for inputs in ((x, x, x), (x, y, y), (y, y, x))}
    packed = PackedWeights(attention)
    own = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda *given: products.append(1) or own(*given)
    )
    with packed.used():
        for inputs, outputs in expected.items():
            torch.testing.assert_close(attention(*inputs), outputs, rtol=0, atol=2e-6)
    assert len(products) == 1 + 2 + 2


@torch.no_grad()
def test_rows_of_several_tokens_are_the_layers_own(monkeypatch):
    attention = Attention(bias=True)
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0))
    expected = attention(x, x, x)
    packed = PackedWeights(attention)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)  # it is not called
    with packed.used():
        found = attention(x, x, x)
    assert all(map(torch.equal, found, expected))
