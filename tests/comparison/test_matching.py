"""`compare.match_kl`: runs are added until each objective has one near each KL; what was broken or
never reached is said, and the same command only looks up what it found.
"""

from pathlib import Path

import numpy as np
import pytest
from world import write_inputs

from alignkit.comparison.compare import compare
from alignkit.comparison.grid import expand
from alignkit.comparison.matching import Search
from alignkit.comparison.measurement import Measurement
from alignkit.comparison.run_state import RunState
from alignkit.config.recipe import load_recipe
from alignkit.errors import ConfigError

RECIPE = """\
model: {name_or_path: model}
data: {train: pairs.jsonl}
train: {steps: 20, batch_size: 6, warmup_steps: 0, learning_rate: 2.0e-2, save_every: 0, log_samples_every: 0}
rewards: [{function: "worth.py:worth"}]
rollout: {max_new_tokens: 4}
compare:
  grid:
    dpo: {beta: [1.0]}
    loose: {name: hdpo, alpha: 0.95, beta: [2]}
  match_kl: [3.2, 4.5]
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

    def written(*changes, text=RECIPE):
        (tmp_path / "matched.yaml").write_text(text)
        return load_recipe(tmp_path / "matched.yaml", ["output_dir=out", *changes])

    return written


@pytest.mark.long
def test_each_objective_has_a_run_near_each_kl(recipe, tmp_path):
    results = compare(recipe())
    matched = results["matched"]
    assert [(row["label"], row["target"]) for row in matched["targets"]] == [
        ("dpo", 3.2),
        ("dpo", 4.5),
        ("loose", 3.2),
        ("loose", 4.5),
    ]
    points = {
        (curve["label"], point["setting"]): point["kl"]["value"]
        for curve in results["curves"]
        for point in curve["points"]
    }
    for row in matched["targets"]:
        assert row["kl"] == pytest.approx(points[row["label"], row["setting"]])
        assert abs(row["kl"] / row["target"] - 1) <= 0.1

    # The verdicts are at these KLs, and everything that was trained is in the price.
    assert [(pair["first"], pair["second"], pair["kl"]) for pair in matched["pairs"]] == [
        ("dpo", "loose", 3.2),
        ("dpo", "loose", 4.5),
    ]
    for row in matched["price"]:
        own = [run for run in results["runs"] if run["label"] == row["label"]]
        assert row["runs"] == len(own) == row["searched"] + 1
        assert row["cpu_seconds"] == pytest.approx(sum(run["cpu_seconds"] for run in own))
    report = (tmp_path / "out" / "report.md").read_text()
    first = matched["targets"][0]
    assert f"| dpo | 3.2 | {first['setting']} | {first['kl']:.3f} |" in report

    # The same command trains nothing anew and finds the same.
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("outcome.json")}
    again = compare(recipe())
    assert again["matched"] == matched
    assert {file: file.stat().st_mtime_ns for file in files} == files
    assert len(list((tmp_path / "out").rglob("outcome.json"))) == len(files)


class Listed:
    """Measurements of a world whose outcomes are listed, by the strength of the run."""

    def __init__(self, by_strength):
        self.by_strength = by_strength

    def read_run(self, point):
        kl, outside = self.by_strength[point.swept["beta"]]
        exact = {"kl": np.array([kl, kl]), "outside": np.array([outside, outside])}
        return Measurement("key", None, exact=exact)


def test_a_run_outside_the_grammar_counts_for_nothing(recipe):
    """Two thirds outside at beta 0.5: the target beyond it is given up, the run is on no curve."""
    loaded = recipe("compare.grid={dpo: {beta: [0.5, 1.0, 2.0]}}", "compare.match_kl=[0.9, 2.0]")
    points = expand(loaded)
    for point in points:
        RunState("finished").write(Path(point.recipe.output_dir))
    search = Search(
        loaded, points, {}, Listed({0.5: (2.0, 0.66), 1.0: (0.87, 0.001), 2.0: (0.3, 0.0)})
    )
    (asked,) = search.next_runs()
    assert asked.swept["beta"] > 0.5
    assert search.broken() == {"dpo-beta=0.5-seed=0"}
    rows = search.rows()
    assert (rows[0]["setting"], rows[0]["kl"]) == ("beta=1.0", pytest.approx(0.87))

    # The run that was asked for leaves the grammar as well: that is the end of it.
    search.measurer.by_strength[asked.swept["beta"]] = (2.0, 0.4)
    RunState("finished").write(Path(asked.recipe.output_dir))
    search.points = [*points, asked]
    assert search.next_runs() == []
    assert search.rows()[1]["setting"] is None
    assert "of its mass is outside the grammar" in search.rows()[1]["words"]

    stale = Search(loaded, points, {points[1].name: "another model"}, search.measurer)
    assert stale.tried("dpo")[1].problem == "the run at beta=1 is stale: another model"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["compare.match_kl=[1, 0]"], "greater than 0"),
        (["compare.match_kl=[1, 1.0]"], "1 stands twice; name each KL once"),
        (["compare.match_kl=0.5"], "it should be a list"),
        (["compare.grid.dpo.beta=0.5"], "`dpo` has none; write its strength as a list"),
        (["compare.grid.dpo.label_smoothing=[0.0, 0.1]"], "has 2: beta, label_smoothing"),
        (["compare.grid.dpo.beta=[0.5, -1]"], "among positive numbers, -1 is none"),
        (["compare.grid.dpo={name: fdpo, divergence: [alpha]}"], "'alpha' is none"),
    ],
)
def test_what_cannot_be_searched_is_refused(recipe, changes, words):
    with pytest.raises(ConfigError) as raised:
        expand(recipe(*changes))
    assert words in str(raised.value)
