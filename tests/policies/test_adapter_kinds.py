"""Adapters that cannot be computed or trained here: one sentence, exit 4, before any work."""

import copy
import inspect

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import pair_rows, pairs, run, save_model, write_rows

import alignkit
from alignkit.batches import Plan
from alignkit.config.adapter_kinds import UNREADABLE, UNTRAINABLE, why_unfit
from alignkit.config.model import AdapterConfig, ModelConfig, ReferenceConfig
from alignkit.errors import ModelError
from alignkit.objectives.preference.dpo import DPO
from alignkit.policies.folding import merge
from alignkit.policies.load import load_frozen, load_pair

LORA = {"r": 2, "target_modules": ["q_proj"]}
UNFIT = {
    "prefix": (PrefixTuningConfig(num_virtual_tokens=2), "PREFIX_TUNING puts tokens of its own"),
    "prompt": (PromptTuningConfig(num_virtual_tokens=2), "PROMPT_TUNING puts tokens of its own"),
    "llama adapter": (
        AdaptionPromptConfig(adapter_len=2, adapter_layers=1),
        "ADAPTION_PROMPT puts learned tokens into the attention",
    ),
    "alora": (LoraConfig(**LORA, alora_invocation_tokens=[4]), "use LORA without them"),
}
UNTRAINED = {
    "adalora": (AdaLoraConfig(total_step=9), "ADALORA needs calls of its own"),
    "replication": (LoraConfig(**LORA, layer_replication=[[0, 2], [0, 2]]), "merge the adapter"),
}
EVERY = UNFIT | UNTRAINED


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def adapted(base, request):
    """The model under an adapter of a kind, and what is said of it."""
    settings, words = EVERY[request.param]
    settings = copy.deepcopy(settings)
    settings.task_type = "CAUSAL_LM"
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings), words


@pytest.mark.parametrize("adapted", EVERY, indirect=True)
def test_an_object_is_refused(adapted, base, tmp_path):
    model, words = adapted
    before = list(model.peft_config)
    with pytest.raises(ModelError, match=f"^model: its adapter .*{words}"):
        alignkit.train(
            DPO(),
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(base),
            data=pair_rows(4),
            output_dir=tmp_path / "run",
            steps=1,
        )
    assert not (tmp_path / "run").exists()
    assert list(model.peft_config) == before


@pytest.mark.parametrize("field", ["model.adapter.path", "model.name_or_path"])
@pytest.mark.parametrize("adapted", EVERY, indirect=True)
def test_a_folder_is_refused(adapted, base, tmp_path, field, capsys):
    model, words = adapted
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    rows = write_rows(tmp_path / "pairs.jsonl", pair_rows(4))
    named = [f"model.name_or_path={base}"] if field == "model.adapter.path" else []
    out = tmp_path / "run"
    arguments = [*named, f"{field}={folder}", f"data.train={rows}", f"output_dir={out}"]
    assert run("train", "dpo", *arguments) == 4
    said = capsys.readouterr().err
    assert f"{field}: the adapter in" in said.replace("\n", " ")
    assert words in " ".join(said.split())
    assert not out.exists()


@pytest.mark.parametrize("adapted", EVERY, indirect=True, ids=str)
def test_a_frozen_model_is_refused_where_it_cannot_be_computed(adapted, tmp_path):
    model, words = adapted
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    if words not in {words for _, words in UNFIT.values()}:
        load_frozen(ModelConfig(name_or_path=str(folder)), "reference.kind", device="cpu")
        return
    with pytest.raises(ModelError, match=f"^reference.kind: the adapter in .*{words}"):
        load_frozen(ModelConfig(name_or_path=str(folder)), "reference.kind", device="cpu")
    with pytest.raises(ModelError, match=words):
        merge(folder, tmp_path / "merged")


def test_adapters_of_several_kinds_at_once(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    mixed = get_peft_model(model, LoraConfig(**LORA), mixed=True)
    with pytest.raises(ModelError, match="give a PeftModel"):
        loaded(mixed, base)


def loaded(model, base):
    live = (model, AutoTokenizer.from_pretrained(base))
    named = ModelConfig(name_or_path="python:model")
    return load_pair(named, ReferenceConfig(), None, Plan("pair"), fixed_data=False, live=live)


@pytest.mark.parametrize("kind", [*UNREADABLE, *UNTRAINABLE])
def test_the_field_of_a_recipe_is_refused(kind):
    with pytest.raises(ValidationError, match=f"peft_type {kind} .*; use LORA"):
        AdapterConfig(peft={"peft_type": kind.lower()})
    assert why_unfit({"peft_type": kind}, "read") is None or kind in UNREADABLE


def test_adamss_is_trained_without_its_adaptive_steps_alone():
    adaptive = {"peft_type": "ADAMSS", "use_asa": True}
    with pytest.raises(ValidationError, match="use_asa needs calls of its own between the steps"):
        AdapterConfig(peft=adaptive)
    assert "use_asa" in why_unfit(adaptive, "continued")
    assert why_unfit(adaptive, "read") is None
    assert AdapterConfig(peft={**adaptive, "use_asa": False}).peft["peft_type"] == "ADAMSS"


# How the layers of the tiny model can be changed; all others with a rank of 2.
FITTING = {
    "BEFT": {"target_modules": ["v_proj"]},
    "BOFT": {"boft_block_size": 4, "target_modules": ["q_proj"]},
    "C3A": {"block_size": 8},
    "DEFT": {},
    "DELORA": {},
    "FOURIERFT": {"n_frequency": 20},
    "GLORA": {},
    "GRALORA": {},
    "HIRA": {},
    "HRA": {},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "LOHA": {},
    "LOKR": {},
    "LORA": {},
    "MISS": {},
    "OFT": {"r": 0, "oft_block_size": 4, "target_modules": ["q_proj"]},
    "OSF": {},
    "PEANUT": {},
    "PSOFT": {"r": 4},
    "PVERA": {},
    "RANDLORA": {"randlora_alpha": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {},
    "SUPERTUNING": {},
    "TINYLORA": {},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6, 7], "target_modules": ["embed_tokens"]},
    "UNILORA": {},
    "VBLORA": {"num_vectors": 4, "vector_length": 4, "topk": 2},
    "VERA": {},
    "WAVEFT": {"n_frequency": 20},
}


@pytest.mark.long
@pytest.mark.parametrize("kind", FITTING)
@torch.no_grad()
def test_other_kinds_have_the_log_probs_of_peft(kind, base):
    """Packed rows against a forward of peft's model for each completion; and the reference stays."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings_of(kind)).eval()
    generator = torch.Generator().manual_seed(0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def move():
        for parameter in trained:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    move()
    plan, bundles = Plan("pair"), pairs(3)
    start = logps(model, bundles)
    pair = loaded(model, base)
    check(pair.logps(bundles, plan), start, start)
    move()
    now = logps(model, bundles)
    assert max((a - b).abs().max() for a, b in zip(now, start)) > 1e-2
    check(pair.logps(bundles, plan), now, start)


def settings_of(kind):
    configs = {str(getattr(k, "value", k)): cls for k, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in configs:
        pytest.skip(f"this version of peft has no {kind}")
    names = inspect.signature(configs[kind]).parameters
    usual = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj", "gate_proj"]}
    given = {name: value for name, value in usual.items() if name in names} | FITTING[kind]
    return configs[kind](task_type="CAUSAL_LM", **given)


def logps(model, bundles):
    """Log-probs of the trained tokens of every completion, each in a row of its own."""
    found = []
    for bundle in bundles:
        for ids, mask in zip(bundle.completions, bundle.masks):
            logits = model(input_ids=torch.cat([bundle.prompt, ids])[None]).logits[0]
            laws = logits[len(bundle.prompt) - 1 : -1].log_softmax(-1)
            found.append(laws.gather(-1, ids[:, None])[mask, 0])
    return found


def check(tokens, policy, reference):
    for found, expected in ((tokens.policy, policy), (tokens.reference, reference)):
        width = found.shape[-1]
        rows = zip(found.reshape(-1, width), tokens.mask.reshape(-1, width), expected)
        for row, mask, values in rows:
            torch.testing.assert_close(row[mask], values, rtol=0, atol=1e-5)
