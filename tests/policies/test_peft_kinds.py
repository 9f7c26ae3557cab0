"""Adapters of all kinds that leave positions alone: trained on, saved, loaded by peft, merged and
resumed. The oracle is peft's own model; the reference is where training began.
"""

import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from world import pair_rows, pairs, run, save_model, write_rows

from alignkit.batches import Plan
from alignkit.config.model import AdapterConfig, ModelConfig, ReferenceConfig
from alignkit.errors import ConfigError
from alignkit.files import read_jsonl
from alignkit.policies.folding import merge
from alignkit.policies.load import load_pair
from alignkit.policies.vocabulary import add_tokens

ROWS = torch.tensor([[1, 5, 6, 7, 8, 9], [1, 9, 8, 3, 2, 4]])
KINDS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_alpha": 8},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole head and embedding": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "biases": {"bias": "all"},
    "pissa": {"init_lora_weights": "pissa"},
    "parameters": {"target_parameters": ["mlp.down_proj.weight"]},
    "ia3": {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A tiny Llama, and one whose head is its embedding and whose layers have biases."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "untied")
    save_model(folder / "tied")
    config = LlamaConfig.from_pretrained(folder / "untied")
    config.tie_word_embeddings = config.attention_bias = True
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder / "tied")
    return folder


def logprobs(model):
    with torch.no_grad():
        return model.eval()(ROWS).logits.log_softmax(-1)


def train(base, out, *overrides):
    settings = (
        "train.steps=4 train.batch_size=4 train.warmup_steps=0 train.log_samples_every=0 "
        "train.learning_rate=0.02 train.save_every=2 train.schedule=constant"
    )
    return run(
        *(
            "train",
            "dpo",
            f"model.name_or_path={base}",
            f"data.train={base.parent / 'pairs.jsonl'}",
        ),
        *(*settings.split(), f"output_dir={out}", *overrides),
    )


# The others take longer together and differ less.
BRIEF = [("dora", "untied"), ("whole head", "tied"), ("biases", "tied"), ("pissa", "untied")]
CASES = [
    pytest.param(kind, tied, marks=[] if (kind, tied) in BRIEF else [pytest.mark.long])
    for kind in KINDS
    for tied in ("untied", "tied")
]


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_trained_saved_loaded_merged_and_resumed(bases, tmp_path, kind, tied):
    write_rows(bases / "pairs.jsonl", pair_rows(8))
    adapter = (
        "model.adapter.peft={"
        + ",".join(
            f"{k}: {v}".replace("True", "true").replace("'", "") for k, v in KINDS[kind].items()
        )
        + "}"
    )
    out = tmp_path / "run"
    assert train(bases / tied, out, adapter) == 0
    rows = [row for row in read_jsonl(out / "metrics.jsonl") if "loss" in row]
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)  # the reference is the start
    assert abs(rows[-1]["rewards/margins"]) > 1e-3

    by_peft = logprobs(AutoPeftModelForCausalLM.from_pretrained(out / "model"))
    assert (
        by_peft - logprobs(AutoModelForCausalLM.from_pretrained(bases / tied))
    ).abs().max() > 1e-3

    merge(out, tmp_path / "merged")
    merged = logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, by_peft, rtol=0, atol=1e-4)

    # Gone after step 2 without a word, and taken up again: the same adapter.
    assert (out / "checkpoints" / "step-2").is_dir()
    shutil.move(out / "model", tmp_path / "model")
    assert train(bases / tied, out, adapter, "--resume", "auto") == 0
    again = logprobs(AutoPeftModelForCausalLM.from_pretrained(out / "model"))
    assert torch.equal(again, by_peft)


@pytest.mark.parametrize(
    ("peft", "kind"),
    [
        ({"use_dora": True}, "adapter_off"),
        ({"modules_to_save": ["lm_head"]}, "adapter_off"),
        ({"bias": "all"}, "frozen"),
        ({"init_lora_weights": False}, "frozen"),
        ({"init_lora_weights": "pissa"}, "frozen"),
    ],
    ids=str,
)
def test_the_reference_stays_where_training_began(bases, peft, kind):
    """Without its adapter a model is not always what it was: then a copy is kept."""
    model = ModelConfig(name_or_path=str(bases / "tied"), adapter=AdapterConfig(r=2, peft=peft))
    plan = Plan("pair")
    pair = load_pair(model, ReferenceConfig(), None, plan, fixed_data=False)
    assert pair.reference_kind == kind
    bundles = pairs(3)
    with torch.no_grad():
        before = pair.logps(bundles, plan)
        torch.testing.assert_close(before.reference, before.policy, rtol=0, atol=1e-5)
        for parameter in pair.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        after = pair.logps(bundles, plan)
    assert torch.equal(after.reference, before.reference)
    assert (after.policy - before.policy).abs().max() > 1e-3
    if kind == "frozen":
        with pytest.raises(ConfigError, match="what it was at the start"):
            load_pair(model, ReferenceConfig(kind="adapter_off"), None, plan, fixed_data=False)


def test_an_adapters_folder_is_trained_further(bases, tmp_path):
    write_rows(bases / "pairs.jsonl", pair_rows(8))
    assert train(bases / "untied", tmp_path / "first", "model.adapter.r=4") == 0
    folder = tmp_path / "first" / "model"
    start = logprobs(AutoPeftModelForCausalLM.from_pretrained(folder))
    (bases / "pairs.jsonl").rename(tmp_path / "pairs.jsonl")
    first = ("data.train=" + str(tmp_path / "pairs.jsonl"), f"model.name_or_path={folder}")
    assert train(bases / "untied", tmp_path / "second", *first) == 0
    rows = [row for row in read_jsonl(tmp_path / "second" / "metrics.jsonl") if "loss" in row]
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    end = logprobs(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "second" / "model"))
    assert (end - start).abs().max() > 1e-3
    assert train(bases / "untied", tmp_path / "third", *first, "model.adapter.r=4") == 2


@pytest.mark.parametrize("tied", ["untied", "tied"])
def test_new_tokens(bases, tmp_path, tied):
    write_rows(
        tmp_path / "pairs.jsonl",
        [{"prompt": f"w{3 + i}", "chosen": "<think> w5", "rejected": "w7"} for i in range(8)],
    )
    data = f"data.train={tmp_path / 'pairs.jsonl'}"
    assert train(bases / tied, tmp_path / "run", data, "model.add_tokens=[<think>,</think>]") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    new = tokenizer.convert_tokens_to_ids("<think>")
    assert tokenizer.decode([new]) == "<think>"
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 25
    weights = model.get_output_embeddings().weight
    assert (weights[new] - weights[new + 1]).abs().max() > 1e-3  # one was trained, one was not


def test_new_rows_begin_at_the_mean(bases):
    model = AutoModelForCausalLM.from_pretrained(bases / "untied")
    tokenizer = AutoTokenizer.from_pretrained(bases / "untied")
    mean = model.get_input_embeddings().weight.mean(0)
    add_tokens(model, tokenizer, ["<a>"])
    torch.testing.assert_close(model.get_input_embeddings().weight[-1], mean)
    with pytest.raises(ConfigError, match="has '<a>' already"):
        add_tokens(model, tokenizer, ["<a>"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adapter": {"peft": {"peft_type": "PREFIX_TUNING"}}}, "moves all positions"),
        ({"adapter": {"peft": {"peft_type": "ADALORA"}}}, "between the steps"),
        ({"adapter": {"path": "x", "peft": {"use_dora": True}}}, "leave `peft` out"),
        ({"quantize": "4bit", "adapter": {}}, "needs the package bitsandbytes, which"),
        ({"quantize": "8bit", "adapter": {}}, "bitsandbytes or torchao"),
        ({"add_tokens": ["<a>"], "adapter": {}}, "train the whole model"),
        ({"add_tokens": ["<a>", "<a>"]}, "doubled"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings, words):
    with pytest.raises(ValidationError, match=words):
        ModelConfig(**settings)


@pytest.mark.parametrize(
    ("peft", "words"),
    [({"use_dorra": True}, "no field use_dorra"), ({"peft_type": "NOVEL"}, "no peft_type NOVEL")],
)
def test_settings_that_peft_does_not_know(bases, peft, words):
    model = ModelConfig(name_or_path=str(bases / "untied"), adapter=AdapterConfig(peft=peft))
    with pytest.raises(ConfigError, match=words):
        load_pair(model, ReferenceConfig(), None, Plan("pair"), fixed_data=False)
