"""Which models several processes can compute together, and what is refused. The computation itself
is in tests/distributed/test_tensor.py.
"""

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM
from world import run, save_model

from alignkit.config.train import MeshConfig, TrainConfig
from alignkit.errors import ConfigError, ModelError
from alignkit.policies.tensor_parallel import check_plan


def model_of(name, **fields):
    config = AutoConfig.for_model(name, **fields)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


SMALL = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32}


def test_the_plan_is_the_models_own():
    model = model_of("qwen3", **SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    plan = check_plan(model, 2)
    assert plan["model.layers.*.self_attn.q_proj"] == "colwise"
    assert plan["model.layers.*.self_attn.q_norm"] == "replicated_with_grad_allreduce"
    assert plan["lm_head"] == "colwise_gather_output"


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("gpt2", {"n_layer": 1}, "transformers has no tp_plan for GPT2LMHeadModel; leave"),
        (
            "llama",
            {**SMALL, "num_attention_heads": 6, "num_key_value_heads": 3},
            "2 does not divide the 3 of num_key_value_heads of LlamaForCausalLM",
        ),
        (
            "qwen3_moe",
            {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 2},
            "the tp_plan of Qwen3MoeForCausalLM asks for .*, and alignkit follows",
        ),
    ],
)
def test_what_cannot_be_cut_is_one_sentence(name, fields, words):
    with pytest.raises(ModelError, match=f"train.mesh.tensor: .*{words}"):
        check_plan(model_of(name, **fields), 2)


def test_a_mesh_holds_all_processes():
    assert MeshConfig(tensor=2).shape(8) == {"replicate": 1, "shard": 4, "tensor": 2}
    assert MeshConfig(replicate=2, shard=2).shape(4) == {"replicate": 2, "shard": 2, "tensor": 1}
    for mesh, processes in [({"tensor": 2}, 3), ({"tensor": 4}, 2), ({"shard": 3}, 4)]:
        with pytest.raises(ConfigError, match=f"does not divide the run's {processes} processes"):
            MeshConfig(**mesh).shape(processes)


@pytest.mark.parametrize(
    ("settings", "code", "sentence"),
    [
        (
            ["train.mesh.shard=3", "--processes", 2],
            2,
            "{replicate: 1, shard: 3, tensor: 1} does not",
        ),
        (["train.mesh.tensor=2", "--processes", 3], 2, "does not divide the run's 3 processes"),
        (["train.mesh.tensor=2", "model.adapter.r=4"], 2, "a model with an adapter cannot be cut"),
        (["train.mesh.tensor=0"], 2, "`train.mesh.tensor`"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_before_anything_starts(
    tmp_path, capsys, settings, code, sentence
):
    model = f"model.name_or_path={save_model(tmp_path / 'model')}"
    out = f"output_dir={tmp_path / 'run'}"
    assert run("train", "dpo", model, out, "train.shard=true", *settings) == code
    said = capsys.readouterr().err
    assert sentence in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_reduce_dtype_belongs_to_shards():
    assert TrainConfig(shard=True, reduce_dtype="float32").reduce_dtype == "float32"
    with pytest.raises(ValidationError, match=r"train\.shard=true"):
        TrainConfig(reduce_dtype="float32")
