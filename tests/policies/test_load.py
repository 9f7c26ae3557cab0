"""What is refused before training begins, with the message a user sees, and what the start probe
decides.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SHAPE, VOCAB, random_bundles, separate_logps, tiny_model, write_model
from tokenizers import Tokenizer, models
from transformers import MllamaForCausalLM, MllamaTextConfig, PreTrainedTokenizerFast

from alignkit.batches import Plan
from alignkit.config.model import AdapterConfig, ModelConfig, ReferenceConfig
from alignkit.errors import ModelError
from alignkit.policies.layout import build_rows
from alignkit.policies.load import load_pair
from alignkit.policies.module import PolicyModule, backbone
from alignkit.policies.probe import check_head, choose_layout, probe_bundle
from alignkit.policies.tokenizer import load_tokenizer

PAIRS = Plan("pair")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("mistral"), "mistral")


def load(name, reference="frozen", **settings):
    return load_pair(
        ModelConfig(name_or_path=str(name), **settings),
        ReferenceConfig(kind=str(reference)),
        None,
        PAIRS,
        fixed_data=True,
    )


def test_missing_and_wrong_folders(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    for name, message in (
        (tmp_path / "nowhere", "there is no folder"),
        (tmp_path / "empty", "holds no config.json"),
        (f"{folder}/config.json", "is a file"),
    ):
        with pytest.raises(ModelError, match=message) as caught:
            load(name)
        assert caught.value.exit_code == 4
        assert "\n" not in str(caught.value)
    with pytest.raises(
        ModelError, match="no tokenizer could be loaded from nobody/no-such-model"
    ) as caught:
        load("nobody/no-such-model")
    assert "\n" not in str(caught.value)


def test_a_hub_name_comes_from_a_read_only_cache_without_a_connection(tmp_path, monkeypatch):
    """Read-only for anyone but root, who may write anywhere: no file may have appeared."""
    cached = tmp_path / "models--ours--tiny"
    write_model(cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was opened"))
    before = sorted(tmp_path.rglob("*"))
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    pair = load("ours/tiny")
    assert pair.logps(random_bundles(1, 2), PAIRS).policy.isfinite().all()
    assert sorted(tmp_path.rglob("*")) == before
    for path in before:
        path.chmod(0o755)


def test_damaged_weights_are_one_sentence(tmp_path):
    write_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="could not be loaded") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_that_the_folder_lacks_are_not_made_up(tmp_path):
    """transformers fills them with random numbers and only reports it."""
    write_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (gone,) = (name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"has no weights for {re.escape(gone)}, which would be"):
        load(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    write_model(tmp_path, vocab=61, tokens=70)
    with pytest.raises(
        ModelError, match=r"ids up to 69, its model has 61 embeddings; use the tokenizer"
    ):
        load(tmp_path)


def test_padding_tokens(tmp_path):
    def written(name, **tokens):
        inner = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=inner, **tokens).save_pretrained(tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return ModelConfig(name_or_path=str(tmp_path / name))

    assert load_tokenizer(written("eos", eos_token="<eos>")).pad_token == "<eos>"
    assert load_tokenizer(written("unk", eos_token="<eos>", unk_token="<unk>")).pad_token == "<unk>"
    with pytest.raises(ModelError, match="no pad, unknown or end token; add one"):
        load_tokenizer(written("none"))


def test_references_that_do_not_match(tmp_path, folder):
    other = write_model(tmp_path / "other", vocab=50)
    with pytest.raises(
        ModelError,
        match=r"reference.kind: the tokenizer of .* \(50 tokens\) is not the policy's \(61 tokens\)",
    ):
        load(folder, other)
    wider = write_model(tmp_path / "wider", vocab=64, tokens=61)
    with pytest.raises(ModelError, match="has a vocabulary of 64, the policy one of 61"):
        load(folder, wider)
    with pytest.raises(ModelError, match=r"reference.kind: there is no folder"):
        load(folder, tmp_path / "nowhere")


def test_a_reference_at_a_path(tmp_path, folder):
    other = write_model(tmp_path, "gpt2", seed=5)
    pair, bundles = load(folder, other), random_bundles(1)
    tokens = pair.logps(bundles, PAIRS)
    expected = separate_logps(tiny_model("gpt2", seed=5), bundles)
    torch.testing.assert_close(tokens.reference, expected, rtol=0, atol=2e-5)
    assert pair.reference_kind == "frozen"


def test_adapters_that_fit_nothing(tmp_path, folder):
    with pytest.raises(ModelError, match=r"model.adapter.target_modules: .*nothing_here"):
        load(folder, adapter=AdapterConfig(target_modules=["nothing_here"]))
    with pytest.raises(ModelError, match=r"model.adapter.path: there is no adapter_config.json"):
        load(folder, adapter=AdapterConfig(path=str(tmp_path)))


def test_the_probe_is_longer_than_the_window_and_finds_a_wrong_mask():
    model = tiny_model("mistral")
    module, bundle = PolicyModule(model), probe_bundle(61, 5, 128)
    assert choose_layout(module, "auto", bundle) == ("shared_prefix", "")
    module.windows = {"": None}
    layout, note = choose_layout(module, "auto", bundle)
    assert layout == "padded"
    assert "cannot branch" in note
    with pytest.raises(ModelError, match=r"use model.layout=auto or padded"):
        choose_layout(module, "shared_prefix", bundle)


def test_models_that_cannot_branch_take_padded_rows(tmp_path):
    source = write_model(tmp_path, "bloom")
    pair = load(source)
    assert pair.layout == "padded"
    assert any("padded rows: this model cannot branch" in note for note in pair.notes)
    bundles = random_bundles(2)
    torch.testing.assert_close(
        pair.logps(bundles, PAIRS).policy,
        separate_logps(tiny_model("bloom"), bundles),
        rtol=0,
        atol=1e-5,
    )


def test_a_head_that_does_more_than_we_know_is_refused():
    module = PolicyModule(tiny_model("granite"))
    check_head(module, probe_bundle(61, None, None))
    module.model.config.logits_scaling = 1.0
    inner = module.model.forward
    module.model.forward = lambda **kwargs: _scaled(inner(**kwargs))
    with pytest.raises(ModelError, match="differ from the model's own"):
        check_head(module, probe_bundle(61, None, None))


def _scaled(output):
    output.logits = output.logits * 3
    return output


def test_padded_is_kept_when_asked_for(folder):
    assert load(folder, layout="padded").layout == "padded"


def test_chunked_attention_gets_padded_rows(tmp_path):
    """Llama 4 keeps its layers under another name than it tells transformers, and sees chunks."""
    pair = load(write_model(tmp_path, "llama4"))
    assert pair.layout == "padded"
    bundles = random_bundles(3, count=3, completions=2, longest=20)
    found = pair.logps(bundles, PAIRS).policy
    torch.testing.assert_close(
        found, separate_logps(tiny_model("llama4"), bundles), rtol=0, atol=2e-5
    )


def test_a_text_model_of_mllama_runs():
    """Its layers are in `model`, while its class names `language_model`."""
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = MllamaTextConfig(
        **{name: SHAPE[name] for name in names},
        num_hidden_layers=3,
        cross_attention_layers=[1],
        vocab_size=VOCAB,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    torch.manual_seed(0)
    model = MllamaForCausalLM(config).eval()
    bundles = random_bundles(3)
    rows = build_rows(bundles, "padded")
    found = rows.scatter(PolicyModule(model)(rows)["policy"])
    torch.testing.assert_close(found, separate_logps(model, bundles), rtol=0, atol=2e-5)


def test_a_model_whose_layers_are_not_found_is_refused():
    model = tiny_model("llama")
    model.layers_elsewhere = model.model
    del model.model
    with pytest.raises(ModelError, match=r"layers of LlamaForCausalLM are neither .*`base_model`"):
        backbone(model)


def test_a_model_that_fails_in_the_probe_is_refused(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(model, "forward", lambda **_: {}["pixel_values"])
    with pytest.raises(ModelError, match=r"LlamaForCausalLM fails on a row of .*pixel_values"):
        check_head(PolicyModule(model), probe_bundle(61, None, 128))
