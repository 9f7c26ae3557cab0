"""The tensors that a server gets are those of a model without an adapter that computes the same."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from alignkit.errors import ModelError
from alignkit.policies.weight_stream import Digest, WeightStream, write_weights

SHAPE = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def llama(tied=False):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied)).eval()


def adapted(model, modules):
    config = LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("modules", [["q_proj"], ["embed_tokens", "lm_head"], "all-linear"])
def test_lora_is_added_wherever_it_is(modules):
    model = adapted(llama(), modules)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other, ids = llama(), torch.arange(11)[None]
    with torch.no_grad():
        assert not torch.allclose(other(ids).logits, model(ids).logits, atol=1e-3)
        other.load_state_dict(dict(WeightStream(model, torch.float32)))
        torch.testing.assert_close(other(ids).logits, model(ids).logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_an_adapter_on_tied_weights_is_refused(module):
    """vLLM would leave the head out."""
    words = r"model.embed_tokens.weight and lm_head.weight are tied, and a server keeps them as one"
    with pytest.raises(ModelError, match=words):
        WeightStream(adapted(llama(tied=True), [module]), torch.float32)


def test_the_file_is_what_the_stream_gives_and_shapes_say(tmp_path):
    model = llama(tied=True)
    stream = WeightStream(model, torch.bfloat16)
    digest = write_weights(stream, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    given = dict(stream)
    assert found.keys() == given.keys() == stream.shapes().keys()
    assert "lm_head.weight" not in given
    for name, value in given.items():
        assert torch.equal(found[name], value)
        assert (stream.shapes()[name].shape, stream.shapes()[name].dtype) == (
            value.shape,
            torch.bfloat16,
        )

    assert write_weights(WeightStream(model, torch.bfloat16), tmp_path) == digest
    assert write_weights(WeightStream(model, torch.float16), tmp_path) != digest
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    assert write_weights(WeightStream(model, torch.bfloat16), tmp_path) != digest


def test_a_digest_depends_on_names_shapes_and_order():
    def digest(*tensors):
        made = Digest()
        for name, tensor in tensors:
            made.add(name, tensor)
        return made.done()

    a, b = ("a", torch.arange(6.0)), ("b", torch.zeros(2))
    assert digest(a, b) == digest(("a", torch.arange(6.0)), b)
    others = [(b, a), (("c", a[1]), b), (("a", a[1].view(2, 3)), b), (("a", -a[1]), b), (a,)]
    assert len({digest(a, b), *(digest(*other) for other in others)}) == 6
    assert digest(*[(str(i), torch.full((3,), i)) for i in range(40)])


def test_a_full_disk_is_said_and_no_shard_is_missed(tmp_path, monkeypatch):
    stream, gathered = WeightStream(llama(), torch.float32), []
    whole = stream._whole
    monkeypatch.setattr(stream, "_whole", lambda name: gathered.append(name) or whole(name))
    written = []

    def full(file, tensor):
        written.append(tensor)
        if len(written) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("alignkit.policies.weight_stream.append", full)
    with pytest.raises(OSError, match="No space left"):
        write_weights(stream, tmp_path)
    assert len(written) == 3
    assert len(gathered) == len(list(stream.shapes()))


def test_those_that_take_part_gather_in_the_order_of_those_that_read(monkeypatch):
    """Tensors that are converted together need not stand together in the model."""
    name = "alignkit.policies.weight_stream.converted_together"
    monkeypatch.setattr(name, lambda _, names: [list(names[::2]), list(names[1::2])])
    monkeypatch.setattr("alignkit.policies.weight_stream.DTensor", torch.Tensor)
    stream = WeightStream(llama(), torch.float32)
    gathered = []
    whole = stream._whole
    monkeypatch.setattr(stream, "_whole", lambda name: gathered.append(name) or whole(name))

    list(stream)
    read = list(gathered)
    gathered.clear()
    stream.take_part()
    assert gathered == read
