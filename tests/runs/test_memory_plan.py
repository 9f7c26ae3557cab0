"""`alignkit plan` against measured peaks: what torch's CPU allocator handed out while two steps of
DPO were taken, from loading the model on.
"""

import runpy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM
from world import run, save_model

from alignkit.batches import Bundle
from alignkit.config.objective import build_objective
from alignkit.config.recipe import load_recipe
from alignkit.policies.load import load_pair
from alignkit.runs.memory_plan import GB, plan_memory
from alignkit.training.optimizer import make_optimizer
from alignkit.training.reduction import Reducer

LENGTH = 128
WIDE = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 32}
MODELS = {
    "qwen3": {"model_type": "qwen3", **WIDE, "num_key_value_heads": 4, "intermediate_size": 704},
    "llama": {"model_type": "llama", **WIDE, "num_key_value_heads": 2, "intermediate_size": 512},
    "gpt2": {"model_type": "gpt2", "n_embd": 256, "n_layer": 6, "n_head": 8, "n_positions": 256},
}
CASES = {
    "qwen3": [],
    "llama": ["model.adapter.r=8", "train.micro_batch_tokens=1024"],
    "gpt2": ["model.gradient_checkpointing=true", "reference.kind=frozen"],
}


def settings_of(name, folder):
    return [
        f"model.name_or_path={folder}",
        f"data.max_length={LENGTH}",
        "train.micro_batch_tokens=512",
        "train.batch_size=8",
        "train.dtype=float32",
        "model.layout=padded",
        "model.attention=sdpa",
        *CASES[name],
    ]


def measured_peak(recipe):
    """Bytes of the allocator at most, while the model is loaded and two steps are taken."""
    objective = build_objective(recipe.objective)
    half = torch.ones(LENGTH // 2, dtype=torch.long)
    mask = torch.ones(LENGTH // 2, dtype=torch.bool)
    bundles = [Bundle(half, [half, half], [mask, mask], str(i)) for i in range(8)]

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        pair = load_pair(
            recipe.model, recipe.reference, None, objective.plan, fixed_data=True, seed=0
        )
        accelerator = Accelerator(cpu=True)
        optimizer = pair.prepare(accelerator, lambda p: make_optimizer(recipe.train, p))
        if pair.reference_kind == "cached":
            bundles = pair.cached(bundles, objective.plan)
        budget = recipe.train.micro_batch_tokens
        reducer = Reducer(objective, pair, accelerator, budget, 1.0)
        for _ in range(2):
            reducer.backward(bundles)
            optimizer.step()
            optimizer.zero_grad()

    events = profiled.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    alive = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        alive += size
        peak = max(peak, alive)
    return peak


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_the_plan_is_within_a_tenth_of_the_measured_peak(tmp_path, name):
    folder = save_model(tmp_path)
    config = AutoConfig.for_model(**MODELS[name], vocab_size=2048)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    recipe = load_recipe("dpo", settings_of(name, folder))

    planned = plan_memory(recipe, 1, device="cpu").peak
    assert planned == pytest.approx(measured_peak(recipe), rel=0.1)


@pytest.mark.parametrize(
    ("settings", "gpus"),
    [
        (["model.adapter.r=16", "model.dtype=bfloat16", "train.batch_size=64"], 8),
        (["train.batch_size=64"], 64),
    ],
)
def test_seventy_billion_parameters_fit_on_paper(settings, gpus):
    shared = ["train.shard=true", "model.gradient_checkpointing=true"]
    folder = Path(__file__).parents[2] / "docs" / "scale_models" / "llama-70b"
    recipe = load_recipe("dpo", [f"model.name_or_path={folder}", *shared, *settings])

    plan = plan_memory(recipe, gpus)
    assert plan.footprint.parameters == 70_553_706_496 + plan.footprint.trained * (gpus == 8)
    assert plan.peak < 80 * GB


def test_a_mesh_divides_weights_and_says_what_it_sends(tmp_path):
    """Two processes that compute together hold half of every matrix, as two shards do."""
    model = f"model.name_or_path={save_model(tmp_path)}"

    def plan(*settings):
        recipe = load_recipe("dpo", [model, "train.shard=true", "train.batch_size=8", *settings])
        return plan_memory(recipe, 4)

    flat, both, twice = (
        plan(*settings)
        for settings in ([], ["train.mesh.tensor=2"], ["train.mesh={replicate: 2, shard: 2}"])
    )
    assert both.memory["weights"] == flat.memory["weights"] == twice.memory["weights"] / 2
    gathered = "weights, gathered for forward, backward and anchors"
    assert both.traffic[gathered] == pytest.approx(flat.traffic[gathered] / 3)
    assert both.traffic["hidden states, summed by those that compute together"] > 0
    assert twice.traffic["gradients, summed over the replicas"] > 0

    # On half of each matrix, the rows of both: what is cut takes as much, what is not twice.
    assert flat.footprint.saved < both.footprint.saved < 2 * flat.footprint.saved


def test_offloaded_state_takes_the_room_of_a_step_alone(tmp_path):
    folder = Path(__file__).parents[2] / "docs" / "scale_models" / "qwen3-8b"
    shared = [f"model.name_or_path={folder}", "model.gradient_checkpointing=true"]
    kept, moved = (
        plan_memory(load_recipe("dpo", [*shared, f"train.offload={value}"]), 1)
        for value in ("false", "true")
    )
    assert kept.memory["moments of the optimiser"] == 8 * kept.footprint.trained
    assert moved.memory["moments of the optimiser"] == 2 * 256 * 2**20


def test_the_tables_of_the_documentation_are_what_is_worked_out():
    """One cell, for time; `python docs/make_scale.py` writes all of them."""
    docs = Path(__file__).parents[2] / "docs"
    script = runpy.run_path(str(docs / "make_scale.py"))
    tables = (docs / "scale.md").read_text().partition(script["BEGIN"])[2]
    first_row = next(line for line in tables.splitlines() if line.startswith("| 8 B | "))
    plan = script["plan_of"]("8 B", "all weights in float32", 64)
    assert script["cell"](plan) == first_row.split(" | ")[2]


def test_what_does_not_fit_is_told_with_the_setting_that_makes_it_fit(tmp_path, capsys):
    model = f"model.name_or_path={save_model(tmp_path)}"
    code = run("plan", "dpo", model, "train.micro_batch_tokens=8192", "--gpu-memory", 1)
    assert code == 0
    assert "of 1: fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "code", "sentence"),
    [
        (["train.batch_size=16", "--gpus", "32"], 2, "is smaller, so some GPUs would have no row"),
        (["model.name_or_path=./nowhere"], 4, "there is no folder ./nowhere"),
        (["train.mesh.shard=3", "--gpus", "4"], 2, "does not divide the run's 4 processes"),
        (["train.mesh.tensor=4", "--gpus", "4"], 4, "does not divide the 2 of num_key_value_heads"),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_sentence(tmp_path, capsys, settings, code, sentence):
    model = f"model.name_or_path={save_model(tmp_path)}"
    assert run("plan", "dpo", model, "train.shard=true", *settings) == code
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
