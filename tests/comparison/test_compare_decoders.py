"""`compare.decode`: decoders beside the grid, measured once, in verdicts, table and picture."""

import json

import pytest
from world import write_inputs

from alignkit.comparison.compare import compare
from alignkit.comparison.decoders import expand_decoders
from alignkit.config.recipe import load_recipe
from alignkit.errors import ConfigError, ModelError

RECIPE = """\
model: {name_or_path: model}
data: {train: pairs.jsonl}
train: {steps: 3, batch_size: 4, warmup_steps: 0, learning_rate: 1.0e-2, save_every: 0, log_samples_every: 0}
rollout: {completions: 2, max_new_tokens: 4}
rewards: [{function: "worth.py:worth"}]
compare:
  grid: {dpo: {beta: [0.1, 1.0]}}
  decode:
    pool: {model: model, method: soft_best_of, n: [2, 4], beta: 0.5}
    cold: {model: model, method: sample, temperature: 0.5}
  prompts: prompts.jsonl
  samples: 4
  base_samples: 4
  best_of: []
  workers: 0
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)

    def written(text=RECIPE):
        (tmp_path / "both.yaml").write_text(text)
        return load_recipe(tmp_path / "both.yaml", ["output_dir=out"])

    return written


def test_decoders_stand_beside_the_grid(recipe, tmp_path):
    results = compare(recipe())
    rows = {row["name"]: row for row in results["decoders"]}
    assert list(rows) == ["pool-n=2", "pool-n=4", "cold"]
    assert rows["pool-n=4"]["reward_calls"] == 4
    assert rows["pool-n=2"]["kl_low"] <= rows["pool-n=2"]["kl"]
    assert rows["cold"]["kl_low"] is None

    (pool, cold) = results["decoder_curves"]
    assert {point["setting"] for point in pool["points"]} == {"n=2", "n=4"}
    assert cold["points"][0]["kl"]["value"] == pytest.approx(rows["cold"]["kl"])
    pairs = {(pair["first"], pair["second"]) for pair in results["verdicts"]["pairs"]}
    assert ("dpo", "pool") in pairs
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| pool | n=4 |" in report

    # Nothing is measured twice; another setting is.
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "decoders").iterdir()}
    compare(recipe(RECIPE.replace("temperature: 0.5", "temperature: 0.9")))
    changed = [file.name for file, time in files.items() if file.stat().st_mtime_ns != time]
    assert changed == ["cold.json"]
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["decoders"][2]["decode"]["temperature"] == 0.9


@pytest.mark.long
def test_decoders_are_measured_apart_with_the_same_figures(recipe, tmp_path):
    """And the error of one that cannot be measured is raised here."""
    expected = compare(recipe())["decoders"]
    for file in (tmp_path / "out" / "decoders").iterdir():
        file.unlink()
    text = RECIPE.replace("workers: 0", "workers: 2")
    assert compare(recipe(text))["decoders"] == expected
    assert (tmp_path / "out" / "decoders" / "log.txt").is_file()  # written by other processes

    bad = text.replace("model, method: sample", "nowhere, method: sample")
    with pytest.raises(ModelError, match="nowhere"):
        compare(recipe(bad))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("dpo: {method: sample}", "is a label of the grid and of `decode`"),
        ("odd: {method: best_of}", "method best_of needs `n`"),
        ("odd: {method: best_of, n: [2, 0]}", "greater than 0"),
    ],
)
def test_faults_are_named_before_anything_is_loaded(recipe, section, words):
    text = RECIPE.replace("cold: {model: model, method: sample, temperature: 0.5}", section)
    with pytest.raises(ConfigError, match=words) as caught:
        expand_decoders(recipe(text))
    assert "both.yaml:" in str(caught.value)
