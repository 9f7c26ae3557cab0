"""Processes that compute each forward together, by the model's `tp_plan`, are one process: losses,
weights, checkpoints. Beside shards and whole replicas too.
"""

import sys

import pytest
import sharded_worker
import torch
from test_sharded import check_same_losses, difference, on, taken_up
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from two_processes import run_to_its_end
from world import VOCAB, pair_rows, save_model, write_rows

pytestmark = pytest.mark.long

CASES = ["dpo", "kto", "rpg", "adamw", "distill", "turns"]
MESHES = {
    "alone": (2, "tensor=2"),
    "shards": (4, "tensor=2,shard=2"),
    "replicas": (4, "tensor=2,replicate=2"),
}


@pytest.fixture(scope="module")
def one(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    for case in CASES:
        sharded_worker.run(case, model, out)
    return out


@pytest.fixture(scope="module", params=MESHES)
def several(model, tmp_path_factory, request):
    processes, mesh = MESHES[request.param]
    return on(processes, model, tmp_path_factory.mktemp("several"), CASES, mesh)


def test_processes_that_compute_together_are_one(one, several):
    for case in CASES:
        check_same_losses(one, several, case)
    # Adam enlarges rounding
    assert all(difference(one, several, case) < 1e-6 for case in CASES if case != "adamw")


def test_the_model_loads_in_one_process(one, several):
    first, second = (
        AutoModelForCausalLM.from_pretrained(out / "dpo" / "model").state_dict()
        for out in (one, several)
    )
    assert first.keys() == second.keys()
    assert max(float((second[name] - value).abs().max()) for name, value in first.items()) < 1e-6


def test_a_checkpoint_goes_on_in_one_process(model, several, tmp_path):
    for case in ("dpo", "adamw"):
        sharded_worker.take_up(case, several, tmp_path)
        sharded_worker.run(case, model, tmp_path, "auto")
        check_same_losses(several, tmp_path, case)
        assert difference(several, tmp_path, case) < 1e-6


def test_a_checkpoint_of_one_process_goes_on_together_bit_by_bit_twice(model, one, tmp_path):
    ends = []
    for number in (1, 2):
        out = taken_up(one, tmp_path / str(number), ["dpo"])
        ends.append(on(2, model, out, ["dpo"], "tensor=2"))
    assert difference(one, ends[0], "dpo") < 1e-6
    assert difference(*ends, "dpo") == 0


def save_qwen(folder, **fields):
    """A random Qwen3: norms between its heads, and an embedding and a head that can be cut."""
    save_model(folder)  # its tokenizer
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.2,
        **fields,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_norms_between_heads_and_what_is_tied(tmp_path, tied):
    model = save_qwen(tmp_path / "model", tie_word_embeddings=tied)
    cases = ["dpo", "kto"]
    for case in cases:
        sharded_worker.run(case, model, tmp_path / "one")
    several = on(2, model, tmp_path / "two", cases, "tensor=2")
    for case in cases:
        check_same_losses(tmp_path / "one", several, case)
        assert difference(tmp_path / "one", several, case) < 1e-6


def test_a_model_without_a_plan_ends_the_command_with_a_sentence(tmp_path):
    model = save_model(tmp_path / "model")  # its tokenizer
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=128)
    config.bos_token_id = config.eos_token_id = 2
    GPT2LMHeadModel(config).save_pretrained(model)
    rows = write_rows(tmp_path / "pairs.jsonl", pair_rows(6))

    settings = [f"model.name_or_path={model}", f"data.train={rows}", "data.eval=null"]
    mesh = ["train.shard=true", "train.mesh.tensor=2", f"output_dir={tmp_path / 'run'}"]
    command = ["-m", "alignkit", "train", "dpo", *settings, *mesh, "--processes", "2"]
    code, said = run_to_its_end([sys.executable, *command])
    assert code == 4, said
    assert "train.mesh.tensor: transformers has no tp_plan for GPT2LMHeadModel; leave" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()
