"""Held-out prompts of an online run: measured with fixed noise over all prompts, watched for early
stopping.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import save_model

from alignkit.config.recipe import load_recipe
from alignkit.errors import DataError
from alignkit.files import read_jsonl
from alignkit.objectives.online.grpo import GRPO
from alignkit.rollout.generate import OneModel, generate
from alignkit.rollout.hf import HFSampler
from alignkit.runs.launch import run_recipe
from alignkit.sources.scoring import Scoring
from alignkit.training.held_out_reward import HeldOut

REWARD = """
def score(prompts, completions, **columns):
    return [float("w5" in completion.split()) for completion in completions]

def falling(prompts, completions, _calls=[], **columns):
    _calls.append(len(completions))
    return [-float(len(_calls)) + 0.1 * (i % 2) for i in range(len(completions))]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    (folder / "helpers.py").write_text(REWARD)
    for name, start in (("train", 3), ("eval", 8)):
        rows = [{"prompt": f"w{start + i} w4"} for i in range(5)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(folder, out, reward, *more):
    text = f"""
model: {{name_or_path: {folder / "model"}}}
data: {{train: {folder / "train.jsonl"}, eval: {folder / "eval.jsonl"}, format: prompt}}
objective: {{name: rloo}}
train: {{steps: 6, batch_size: 4, eval_every: 1, save_every: 0, log_samples_every: 0}}
rollout: {{completions: 2, max_new_tokens: 4}}
rewards: [{{function: "{folder / "helpers.py"}:{reward}"}}]
output_dir: {out}
"""
    path = out.with_suffix(".yaml")
    path.write_text(text)
    return load_recipe(path, list(more))


def test_held_out_reward_is_that_of_the_model_at_that_step(folder, tmp_path):
    loaded = recipe(folder, tmp_path / "run", "score")
    run_recipe(loaded)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert all("eval_reward" in row and "eval_completions/mean_length" in row for row in rows)
    model = tmp_path / "run" / "model"
    models = OneModel(
        AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    )
    prompts = [
        json.loads(line)["prompt"] for line in (folder / "eval.jsonl").read_text().splitlines()
    ]
    texts = generate(models, prompts, max_new_tokens=4, seed=1)  # train.seed + 1, step 0
    assert rows[-1]["eval_reward"] == pytest.approx(
        sum("w5" in row[0].split() for row in texts) / len(prompts), abs=1e-12
    )


def test_early_stopping_watches_the_held_out_reward(folder, tmp_path):
    result = run_recipe(recipe(folder, tmp_path / "run", "falling", "train.early_stopping=2"))
    assert result.stopped_early
    assert result.step == 3  # the first is the best, then two that are worse
    best = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    assert best == {"step": 1}


def test_a_reward_that_never_applies_is_an_error(folder):
    models = OneModel(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    prompts = [SimpleNamespace(ids=torch.tensor([3, 4]), text="w3 w4", columns={})]
    nothing = HeldOut(
        prompts,
        HFSampler(models, max_new_tokens=2),
        Scoring(GRPO().plan, lambda p, ids: "x", lambda *a, **k: [None]),
        Accelerator(cpu=True),
    )
    with pytest.raises(DataError, match=r"no held-out completion has a score"):
        nothing()
