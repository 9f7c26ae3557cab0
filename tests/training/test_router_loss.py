"""The routers' auxiliary loss of mixtures of experts: its gradient against transformers' own."""

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from world import pair_rows, pairs, save_model, write_rows

from alignkit.config import load_recipe
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.errors import ConfigError, ModelError
from alignkit.files import read_jsonl
from alignkit.objectives.preference.aot import AOT
from alignkit.objectives.preference.dpo import DPO
from alignkit.objectives.preference.sft import SFT
from alignkit.policies.layout import build_rows
from alignkit.policies.load import load_pair
from alignkit.policies.module import causal_lm
from alignkit.policies.router import router_of
from alignkit.runs.launch import run_recipe
from alignkit.training.reduction import Reducer

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXTURES = {
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "router_aux_loss_coef": 0.3,
    },
    "mixtral": {"num_local_experts": 4, "router_aux_loss_coef": 0.2},
}


def tiny(family, **changes):
    config = AutoConfig.for_model(family, **{**SHAPE, **MIXTURES.get(family, {}), **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tokenizer with each of the models on disk."""

    def written(family):
        folder = save_model(tmp_path_factory.mktemp(family))
        tiny(family).save_pretrained(folder)
        return folder

    return {family: written(family) for family in MIXTURES}


def step(folder, objective, bundles, coefficient, *, layout="padded", budget=4096, **model):
    """One step's metrics, its gradients by name, and the policy pair."""
    accelerator = Accelerator(cpu=True)
    pair = load_pair(
        ModelConfig(name_or_path=str(folder), layout=layout, **model),
        ReferenceConfig(),
        None,
        objective.plan,
        fixed_data=True,
        router_aux_loss=coefficient,
    )
    pair.prepare(accelerator, lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    metrics = Reducer(objective, pair, accelerator, budget).backward(bundles)
    named = pair.base.named_parameters()
    return metrics, {n: p.grad.clone() for n, p in named if p.grad is not None}, pair


def of_transformers(pair, bundles, layout="padded"):
    """transformers' own auxiliary loss of the rows, with its gradients by name."""
    rows = build_rows(bundles, layout)
    mask = torch.arange(rows.input_ids.shape[1]) < rows.lengths[:, None]
    pair.base.zero_grad()
    output = causal_lm(pair.base.model)(
        input_ids=rows.input_ids, attention_mask=mask.long(), output_router_logits=True
    )
    output.aux_loss.backward()
    named = pair.base.named_parameters()
    return output.aux_loss.item(), {n: p.grad.clone() for n, p in named if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objective", [SFT(), DPO(), AOT()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("family", MIXTURES)
def test_the_gradient_includes_the_loss_of_the_routers(folders, family, objective, checkpointing):
    """What it adds to a step is the coefficient of the config times transformers' own loss."""
    bundles = pairs(4, k=1 if isinstance(objective, SFT) else 2)
    settings = {"gradient_checkpointing": checkpointing}
    plain, without, _ = step(folders[family], objective, bundles, 0, **settings)
    metrics, gradients, pair = step(folders[family], objective, bundles, "auto", **settings)

    weight = MIXTURES[family]["router_aux_loss_coef"]
    loss, expected = of_transformers(pair, bundles)
    assert pair.base.router.coefficient == weight
    assert "aux_loss" not in plain
    assert metrics["aux_loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["loss"] - plain["loss"] == pytest.approx(weight * loss, rel=1e-4)

    routers = [name for name in expected if "gate" in name and expected[name].abs().max() > 1e-4]
    assert routers, "the routers themselves are trained"
    for name, gradient in expected.items():
        added = gradients[name] - without.get(name, 0)
        torch.testing.assert_close(added, weight * gradient, rtol=0, atol=1e-5, msg=name)


def test_micro_batches_are_weighted_by_their_trained_tokens(folders):
    bundles = pairs(4, k=1)
    small, _, pair = step(folders["mixtral"], SFT(), bundles, 1.0, budget=1)
    losses = [of_transformers(pair, [bundle])[0] for bundle in bundles]
    tokens = [bundle.n_trained for bundle in bundles]
    mean = sum(loss * n for loss, n in zip(losses, tokens)) / sum(tokens)
    assert small["aux_loss"] == pytest.approx(mean, rel=1e-5)


def test_branched_rows_count_a_prompt_once(folders):
    bundles = pairs(3)
    metrics, _, pair = step(folders["qwen3_moe"], DPO(), bundles, "auto", layout="shared_prefix")
    router, _ = router_of(causal_lm(pair.base.model), "auto")
    rows = build_rows(bundles, "shared_prefix")
    assert int(rows.lengths.sum()) < int(build_rows(bundles, "padded").lengths.sum())
    logits = pair.base._run(rows, output_router_logits=True).router_logits
    assert metrics["aux_loss"] == pytest.approx(router.loss(logits, rows).item(), rel=1e-5)


def test_an_adapter_is_trained_with_it(folders):
    model = get_peft_model(
        tiny("mixtral"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    router, note = router_of(causal_lm(model), "auto")
    assert router.coefficient == 0.2
    assert note == (
        "the routers' auxiliary loss is trained on with weight 0.2 (the config's coefficient)"
    )


def test_models_without_a_router():
    assert router_of(tiny("llama"), "auto") == (None, "")
    assert router_of(tiny("llama"), 0) == (None, "")
    assert router_of(tiny("mixtral", router_aux_loss_coef=0.0), "auto") == (None, "")
    with pytest.raises(ModelError, match=r"transformers has no router loss for LlamaForCausalLM"):
        router_of(tiny("llama"), 0.1)
    llama4 = tiny("llama4_text", head_dim=8, num_local_experts=2, intermediate_size_mlp=16)
    found, note = router_of(llama4, "auto")
    assert found is None
    assert note == "no router loss: transformers has none for Llama4ForCausalLM"


def test_a_run_shows_it_and_writes_down_the_coefficient(folders, tmp_path):
    rows = write_rows(tmp_path / "pairs.jsonl", pair_rows(8))

    def recipe(name, family, *overrides):
        settings = ("train.steps=2", "train.batch_size=4", "train.warmup_steps=0")
        paths = (f"model.name_or_path={folders[family]}", f"data.train={rows}")
        out = f"output_dir={tmp_path / name}"
        return load_recipe("dpo", [out, *paths, *settings, "train.log_samples_every=0", *overrides])

    run_recipe(recipe("auto", "mixtral"))
    metrics = [row for row in read_jsonl(tmp_path / "auto" / "metrics.jsonl") if "loss" in row]
    assert all(row["aux_loss"] > 0.5 for row in metrics)
    assert load_recipe(tmp_path / "auto" / "recipe.yaml").train.router_aux_loss == 0.2

    run_recipe(recipe("off", "mixtral", "train.router_aux_loss=0"))
    assert not any("aux_loss" in row for row in read_jsonl(tmp_path / "off" / "metrics.jsonl"))

    for refused in ("train.router_aux_loss=-1", "train.router_aux_loss=often"):
        with pytest.raises(ConfigError, match=r"train\.router_aux_loss"):
            recipe("never", "mixtral", refused)
