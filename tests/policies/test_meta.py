"""A model that is filled slice by slice is the one that transformers loads: weights, tied ones,
conversions, buffers, and the adapter's random start.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from alignkit.config.model import AdapterConfig
from alignkit.errors import ModelError
from alignkit.policies.adapters import add_adapter
from alignkit.policies.meta import Weights, as_if_loaded, without_weights
from alignkit.policies.sharded_export import plan_files, write_file
from alignkit.policies.sharding import owned

SMALL = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=19, n_embd=16, n_layer=2, n_head=2)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, sliding_window=4)),
    "experts": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8)
    ),
}


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path):
    torch.manual_seed(1)
    FAMILIES[request.param]().save_pretrained(tmp_path, max_shard_size="6KB")
    return tmp_path


def built(folder):
    """The model without weights, and what fills it."""
    config = AutoConfig.from_pretrained(folder)
    model = without_weights(AutoModelForCausalLM, config, str(folder), torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())
    return model, Weights(model, str(folder))


def test_a_filled_model_is_the_loaded_one(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    model, weights = built(folder)
    weights.fill("cpu")

    for tensors in ("named_parameters", "named_buffers"):
        expected, found = (dict(getattr(m, tensors)()) for m in (loaded, model))
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
    assert len(owned(model)) == len(list(loaded.parameters()))

    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    assert torch.equal(model(ids).logits, loaded(ids).logits)


def test_an_adapter_starts_with_the_same_numbers(folder):
    """The random numbers are drawn as for a model whose weights are there, and none is lost."""
    targets = ["c_attn"] if (folder / "config.json").read_text().count("gpt2") else ["q_proj"]
    adapter = AdapterConfig(r=2, target_modules=targets)
    loaded = add_adapter(AutoModelForCausalLM.from_pretrained(folder), adapter, seed=3)
    model, weights = built(folder)
    with as_if_loaded(model):
        adapted = add_adapter(model, adapter, seed=3)
    weights.fill("cpu")

    expected, found = (dict(m.named_parameters()) for m in (loaded, adapted))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
        assert found[name].requires_grad == value.requires_grad == ("lora_" in name)


def test_files_written_tensor_by_tensor_are_those_of_save_pretrained(folder, tmp_path):
    """Names and conversions are turned back: experts are files' tensors of their own again."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    shapes = {name: torch.empty_like(p, device="meta") for name, p in tensors.items()}
    (plan,) = plan_files(model, shapes)
    assert write_file(model, tmp_path, plan, tensors.__getitem__, writes=True) is None

    (tmp_path / "whole").mkdir()
    model.save_pretrained(tmp_path / "whole")
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def spoilt(folder, change):
    """The folder with one file of weights, changed."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder / "one")
    file = folder / "one" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder / "one"


@pytest.mark.parametrize("folder", ["tied"], indirect=True)
def test_weights_that_do_not_fit_are_refused(folder):
    def without_norm(tensors):
        del tensors["model.norm.weight"]

    def longer(tensors):
        tensors["model.norm.weight"] = torch.ones(17)

    def untied(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    complaints = {
        without_norm: "lack 1 weights of the model, the first is model.norm.weight",
        longer: r"it has the shape \[17\], the model's is \[16\]",
        untied: "the config ties it to another weight, but the files hold another value",
    }
    for change, complaint in complaints.items():
        _, weights = built(spoilt(folder, change))
        with pytest.raises(ModelError, match=complaint):
            weights.fill("cpu")
