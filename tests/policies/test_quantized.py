"""A base in few bits under a trained adapter, where the package for it is installed."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from world import pairs, save_model

from alignkit.batches import Plan
from alignkit.config.model import AdapterConfig, ModelConfig, ReferenceConfig
from alignkit.policies.load import load_pair

PACKAGES = {"8bit": ["bitsandbytes", "torchao"], "4bit": ["bitsandbytes"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wide enough for the blocks of the packages."""
    folder = tmp_path_factory.mktemp("wide")
    vocabulary = len(AutoTokenizer.from_pretrained(save_model(folder)))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def unpacked(module):
    """The weights of a layer in few bits as numbers."""
    if hasattr(module.weight, "dequantize") and type(module).__name__ == "Linear":  # torchao's
        return module.weight.dequantize()
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    if hasattr(module.weight, "quant_state"):
        return dequantize_4bit(module.weight.data, module.weight.quant_state)
    scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    return int8_vectorwise_dequant(module.weight.data, scales)


def in_full(model):
    """Put layers in full, with the same numbers, in the place of those in few bits."""
    for name, module in list(model.named_modules()):
        if name.endswith("base_layer"):
            layer = nn.Linear(module.in_features, module.out_features, bias=False)
            layer.weight = nn.Parameter(unpacked(module).float(), requires_grad=False)
            model.set_submodule(name, layer)


def gradients(pair, bundles):
    """Of all adapters, for the sum of the log-probs."""
    pair.logps(bundles, Plan("pair")).policy.sum().backward()
    result = {
        name: parameter.grad.clone()
        for name, parameter in pair.base.model.named_parameters()
        if parameter.grad is not None
    }
    pair.base.model.zero_grad()
    return result


@pytest.mark.parametrize("bits", PACKAGES)
def test_gradients_are_those_of_the_same_weights_in_full(folder, bits):
    if not any(map(find_spec, PACKAGES[bits])):
        pytest.skip(f"{bits} needs {' or '.join(PACKAGES[bits])}")
    model = ModelConfig(
        name_or_path=str(folder), quantize=bits, adapter=AdapterConfig(r=4), dtype="float32"
    )
    pair = load_pair(
        model,
        ReferenceConfig(kind="adapter_off"),
        None,
        Plan("pair"),
        device="cpu",
        fixed_data=True,
    )
    for name, parameter in pair.base.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)  # at 0 the gradient of the other half is 0
    bundles = pairs(2)
    with torch.no_grad():  # as the reference is scored; packages may change weights here
        pair.logps(bundles, Plan("pair"))

    in_few_bits = gradients(pair, bundles)
    in_full(pair.base.model)
    exact = gradients(pair, bundles)

    assert in_few_bits.keys() == exact.keys()
    assert len(exact) == 2 * 7 * 2  # both halves, seven layers, two blocks
    tolerance = 0.05 if bits == "8bit" else 1e-3  # 8 bits round what flows through them too
    for name, gradient in exact.items():
        assert (in_few_bits[name] - gradient).norm() < tolerance * gradient.norm(), name
