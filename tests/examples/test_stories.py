"""The tutorial's example in a shorter form: DPO on story sentiment makes the stories happier,
close to the base model.
"""

import importlib.util
from pathlib import Path

import pytest

from alignkit.config.recipe import load_recipe
from alignkit.runs.launch import run_recipe

pytest.importorskip("vaderSentiment", reason="the example scores with vaderSentiment")


@pytest.mark.long
def test_stories_become_happier(shared, tmp_path):
    path = Path(__file__).resolve().parents[2] / "examples" / "stories.py"
    spec = importlib.util.spec_from_file_location("stories", path)
    stories = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stories)
    settings = [
        f"model.name_or_path={shared / 'stories260k'}",
        f"data.train={shared / 'stories_sentiment' / 'preferences_train.jsonl'}",
        f"output_dir={tmp_path / 'run'}",
        "objective.beta=0.1", "train.steps=30", "train.batch_size=16", "train.learning_rate=2e-4", "train.warmup_steps=5",
        "train.log_samples_every=0", "train.save_every=0", "train.schedule=linear",
    ]  # fmt: skip
    run_recipe(load_recipe("dpo", settings))
    base, prompts = shared / "stories260k", shared / "stories_sentiment" / "prompts_test.jsonl"
    before, at_base = stories.evaluate(base, base, prompts, last=60)
    after, divergence = stories.evaluate(base, tmp_path / "run" / "model", prompts, last=60)
    assert at_base == pytest.approx(0, abs=1e-6)
    assert after > before + 0.12
    assert 0 < divergence < 6
