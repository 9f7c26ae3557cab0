"""Merged models against sums that are made here in float64."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import run, save_model

from alignkit.errors import ConfigError, ModelError
from alignkit.runs.merge import MergeRequest, merge_models

RANK, ALPHA = 2, 6


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A base model, two LoRA adapters on it and two models beside it."""
    monkeypatch.chdir(tmp_path)
    base = save_model(tmp_path / "base")
    for seed, name in enumerate(["one", "two"], start=1):
        network = AutoModelForCausalLM.from_pretrained(base)
        settings = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"
        )
        adapted = get_peft_model(network, settings)
        generator = torch.Generator().manual_seed(seed)
        for key, value in adapted.named_parameters():
            if "lora_" in key:
                value.data = torch.randn(value.shape, generator=generator)
        adapted.save_pretrained(tmp_path / name)
        save_model(tmp_path / f"full_{name}", seed)
    return tmp_path


def weights(folder):
    file = Path(folder) / "model.safetensors"
    return {key: value.double() for key, value in load_file(file).items()}


def delta(adapter, key):
    """alpha / r * B A of one weight in float64; 0 where the adapter has none."""
    factors = load_file(Path(adapter) / "adapter_model.safetensors")
    place = f"base_model.model.{key.removesuffix('.weight')}"
    if f"{place}.lora_A.weight" not in factors:
        return 0.0
    a, b = (factors[f"{place}.lora_{letter}.weight"].double() for letter in "AB")
    return ALPHA / RANK * b @ a


def test_adapters_are_merged_by_their_deltas(world):
    numbers = ["--weights", "0.25", "0.75", "--share", "0.5", "1"]
    assert run("merge", "one", "two", *numbers, "--to", "merged") == 0
    base = weights("base")
    for share in (0.5, 1.0):
        merged = weights(f"merged/{share:g}")
        assert merged.keys() == base.keys()
        for key, start in base.items():
            exact = start + share * (0.25 * delta("one", key) + 0.75 * delta("two", key))
            torch.testing.assert_close(merged[key], exact, rtol=1e-6, atol=1e-6)

    record = json.loads(Path("merged/0.5/merge.json").read_text())
    assert [(m["name"], m["weight"]) for m in record["models"]] == [("one", 0.25), ("two", 0.75)]
    assert (record["method"], record["share"]) == ("linear", 0.5)
    assert record["start"]["name"].endswith("base")
    assert AutoTokenizer.from_pretrained("merged/1").get_vocab()["w5"] == 5


def test_slerp_of_whole_models(world):
    options = ["--method", "slerp", "--toward", "base", "--to", "merged"]
    assert run("merge", "full_one", "full_two", *options) == 0
    base, one, two, merged = map(weights, ("base", "full_one", "full_two", "merged"))
    for key, start in base.items():
        first, second = one[key] - start, two[key] - start
        if not first.norm() * second.norm():
            exact = start + (first + second) / 2
        else:
            cosine = (first * second).sum() / first.norm() / second.norm()
            angle = torch.acos(cosine)
            exact = start + torch.sin(angle / 2) / torch.sin(angle) * (first + second)
        torch.testing.assert_close(merged[key], exact, rtol=1e-5, atol=1e-6)


def test_one_model_towards_its_start_in_the_starts_dtype(world):
    AutoModelForCausalLM.from_pretrained("base", dtype=torch.bfloat16).save_pretrained("half")
    AutoTokenizer.from_pretrained("base").save_pretrained("half")
    merge_models(MergeRequest(["full_one"], Path("merged"), toward="half", shares=[0.3]))
    merged = load_file("merged/model.safetensors")
    half = load_file("half/model.safetensors")
    one = load_file("full_one/model.safetensors")
    for key, start in half.items():
        assert merged[key].dtype == torch.bfloat16
        exact = (start.float() + 0.3 * (one[key] - start.float())).bfloat16()
        torch.testing.assert_close(merged[key], exact, rtol=2**-7, atol=0)


def test_tied_tensors_are_merged_once(world):
    for name in ("base", "full_one"):
        network = AutoModelForCausalLM.from_pretrained(name)
        network.config.tie_word_embeddings = True
        network.tie_weights()
        network.save_pretrained(f"tied_{name}")
        AutoTokenizer.from_pretrained("base").save_pretrained(f"tied_{name}")
    merge_models(MergeRequest(["tied_full_one"], Path("merged"), toward="tied_base", shares=[0.5]))
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert merged.lm_head.weight.data_ptr() == merged.get_input_embeddings().weight.data_ptr()
    key = "model.embed_tokens.weight"
    exact = (weights("tied_base")[key] + weights("tied_full_one")[key]) / 2
    torch.testing.assert_close(weights("merged")[key], exact, rtol=1e-6, atol=1e-7)


def test_what_cannot_be_merged_is_refused(world, capsys):
    with pytest.raises(ConfigError, match="one weight per model"):
        MergeRequest(["one", "two"], Path("merged"), weights=[1.0])
    with pytest.raises(ConfigError, match="nothing says which one model"):
        merge_models(MergeRequest(["full_one", "full_two"], Path("merged")))
    other = AutoModelForCausalLM.from_pretrained("base")
    other.resize_token_embeddings(40)
    other.save_pretrained("larger")
    AutoTokenizer.from_pretrained("base").save_pretrained("larger")
    with pytest.raises(ModelError, match="not the same kind of model"):
        merge_models(MergeRequest(["larger"], Path("merged"), toward="base"))
    assert run("merge", "one", "two") == 2
    assert run("merge", "one", "two", "--method", "sum", "--to", "merged") == 2
    assert not Path("merged").exists()


def test_weights_by_tensor_name(world, capsys):
    """The tensors that match are those of one model alone, the others of the other; the first pattern
    that matches counts, and one that matches all is an ordinary merge.
    """
    patterns = ["--tensors", "*layers.1.mlp.*=0,0", "--tensors", "*.mlp.*=0,1"]
    names = ["full_one", "full_two", "--toward", "base", "--weights", "1", "0"]
    assert run("merge", *names, *patterns, "--to", "by_name") == 0
    base, one, two, merged = map(weights, ("base", "full_one", "full_two", "by_name"))
    for key, value in merged.items():
        source = one
        if ".mlp." in key:
            source = base if "layers.1." in key else two
        torch.testing.assert_close(value, source[key], rtol=1e-6, atol=1e-7)
    assert json.loads(Path("by_name/merge.json").read_text())["tensors"]["*.mlp.*"] == [0, 1]

    assert run("merge", *names[:4], "--tensors", "*=0.3,0.7", "--to", "all") == 0
    assert run("merge", *names[:4], "--weights", "0.3", "0.7", "--to", "plain") == 0
    for key, value in weights("all").items():
        assert torch.equal(value, weights("plain")[key])

    for text, words in (
        ("*.mlp.*", "write PATTERN=W,W"),
        ("*.moe.*=0,1", "no tensor is called *.moe.*"),
        ("*.mlp.*=1", "give one weight per model"),
    ):
        assert run("merge", *names[:4], "--tensors", text, "--to", "refused") == 2
        assert words in capsys.readouterr().err
        assert not Path("refused").exists()
