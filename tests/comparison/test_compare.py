"""A comparison as a whole, on a tiny model: failed and interrupted runs, what is repeated and what
is not, the report.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from world import save_model

from alignkit.comparison import compare as module
from alignkit.comparison.compare import check_points, compare
from alignkit.comparison.grid import expand
from alignkit.config.recipe import load_recipe
from alignkit.errors import AlignkitError, ConfigError, DataError, ModelError
from alignkit.runs import launch
from alignkit.training.signals import Interrupted

HELPERS = """
def score(prompts, completions, **columns):
    return [float("w5" in c) - 0.1 * len(c.split()) for c in completions]

def broken(prompts, completions, **columns):
    raise RuntimeError("the reward <b>fell over</b>")

def silent(prompts, first, second):
    return ["no idea"] * len(first)
"""
RECIPE = """\
model: {name_or_path: model}
data: {train: pairs.jsonl, eval: held_out.jsonl}
train: {steps: 4, batch_size: 4, warmup_steps: 0, learning_rate: 1.0e-2, save_every: 2, log_samples_every: 0}
rollout: {completions: 2, max_new_tokens: 5}
rewards: [{function: "helpers.py:score"}]
compare:
  grid:
    dpo: {beta: [0.1, 1.0]}
    rloo: {beta: 0.5}
    broken: {name: rloo, beta: 0.5}
  overrides:
    broken: {rewards: [{function: "helpers.py:broken"}]}
  samples: 4
  base_samples: 8
  best_of: [2, 4]
  correct: 0.5
  workers: 0
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    Path("helpers.py").write_text(HELPERS)
    pairs = [
        {"prompt": f"w{3 + i}", "chosen": f"w5 w{6 + i}", "rejected": f"w{7 + i}"}
        for i in range(10)
    ]
    held_out = [{**row, "prompt": f"{row['prompt']} w4"} for row in pairs]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    Path("held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    Path("mine.yaml").write_text(RECIPE)
    return tmp_path


@pytest.fixture
def trained(monkeypatch):
    """Names of the runs that were trained, in order."""
    names = []
    real = launch.run_recipe
    monkeypatch.setattr(
        launch,
        "run_recipe",
        lambda r, *a, **k: names.append(Path(r.output_dir).name) or real(r, *a, **k),
    )
    return names


NAMES = ["dpo-beta=0.1-seed=0", "dpo-beta=1.0-seed=0", "rloo-seed=0", "broken-seed=0"]


def test_a_comparison_with_a_failed_run_and_its_continuation(world, trained):
    found = compare(load_recipe("mine.yaml"))
    out = Path("runs/mine")
    assert trained == NAMES
    assert found == json.loads((out / "results.json").read_text())
    runs = {run["name"]: run for run in found["runs"]}
    assert [runs[name]["status"] for name in NAMES] == ["finished"] * 3 + ["failed"]
    assert "the reward <b>fell over</b>" in runs["broken-seed=0"]["reason"]
    assert [curve["label"] for curve in found["curves"]] == ["dpo", "rloo"]
    assert {pair["first"] + pair["second"] for pair in found["verdicts"]["pairs"]} == {"dporloo"}
    assert [row["n"] for row in found["baselines"]["best_of_n"]] == [2, 4]
    assert found["baselines"]["samples"] == 8
    assert len(found["pass_at_k"]) == 4
    assert runs[NAMES[0]]["calibration"]["counts"]
    markdown, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    assert "`broken-seed=0` failed: reward broken raised RuntimeError" in markdown
    assert "&lt;b&gt;fell over&lt;/b&gt;" in page
    assert "<b>fell" not in page

    before = {name: (out / "runs" / name / "outcome.json").read_text() for name in NAMES}
    mended = HELPERS.replace(
        'raise RuntimeError("the reward <b>fell over</b>")', "return score(prompts, completions)"
    )
    Path("helpers.py").write_text(mended)
    for name in [name for name in sys.modules if name.startswith("_alignkit_helpers")]:
        del sys.modules[name]  # another process would read the file again
    again = compare(load_recipe("mine.yaml"))
    assert trained[4:] == ["broken-seed=0"]
    assert [run["status"] for run in again["runs"]] == ["finished"] * 4
    assert all(
        (out / "runs" / name / "outcome.json").read_text() == before[name] for name in NAMES[:3]
    )
    assert again["runs"][0]["figures"] == runs[NAMES[0]]["figures"]
    assert len(list((out / "reference").glob("*.safetensors"))) == 1

    with pytest.raises(
        ConfigError,
        match=r"holds a finished run with other settings \(train\.steps: 4 -> 5\): undo the change",
    ):
        compare(load_recipe("mine.yaml", ["train.steps=5"]))
    measured = compare(
        load_recipe("mine.yaml", ["compare.samples=2", "compare.judge.function=helpers.py:silent"])
    )
    assert trained[5:] == []  # other samples and another judge: measured anew, not trained
    for run in measured["runs"]:
        said = re.fullmatch(
            r"no win rate: all (\d+) verdicts of the judge are invalid; look at its .*",
            run["wins"]["words"],
        )
        assert 0 < int(said[1]) <= 20  # equal texts are not asked about
        assert run["wins"]["rate"]["value"] is None
        assert f"`{run['name']}`: {said[0]}" in (out / "report.md").read_text()


def test_an_interrupted_run_goes_on_and_finished_ones_are_not_repeated(world, trained, monkeypatch):
    recipe = load_recipe(
        "mine.yaml", ["compare.overrides={}", "compare.grid={dpo: {beta: [0.1, 1.0, 2.0]}}"]
    )
    real, resumed = launch.run_recipe, []

    def interrupted(run, resume, **rest):
        resumed.append(resume)
        if run.objective["beta"] == 1.0:
            raise Interrupted(signal.SIGTERM, "stopped by signal 15 after step 2")
        return real(run, resume, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "run_recipe", interrupted)
        with pytest.raises(
            Interrupted, match="stopped with 1 of 3 runs finished; the same command goes on"
        ) as caught:
            compare(recipe)
        assert caught.value.exit_code == 143
    assert not Path("runs/mine/results.json").exists()
    trained.clear()
    found = compare(recipe)
    assert trained == ["dpo-beta=1.0-seed=0", "dpo-beta=2.0-seed=0"]
    assert [run["status"] for run in found["runs"]] == ["finished"] * 3


@pytest.mark.long
def test_a_stopped_command_goes_on_in_worker_processes(world):
    """The command line with a worker, SIGTERM while a run is at work, and the same command again."""
    grid = [
        "compare.overrides={}",
        "compare.grid={dpo: {beta: 0.1}}",
        "train.steps=150",
        "compare.workers=1",
    ]
    command = [sys.executable, "-m", "alignkit", "compare", "mine.yaml", *grid]
    environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).resolve().parents[2])}
    rows = Path("runs/mine/runs/dpo-seed=0/metrics.jsonl")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        until = time.monotonic() + 120
        while (
            not (rows.exists() and rows.stat().st_size)
            and time.monotonic() < until
            and process.poll() is None
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=120)[0]
    assert process.returncode == 143, said
    assert "stopped with 0 of 1 runs finished; the same command goes on from here" in said
    saved = list(rows.parent.glob("checkpoints/step-*"))
    assert saved, (rows.parent / "log.txt").read_text()
    found = compare(load_recipe("mine.yaml", [*grid[:3], "compare.workers=0"]))
    assert found["runs"][0]["status"] == "finished"
    steps = [json.loads(line)["step"] for line in rows.read_text().splitlines()]
    assert steps == list(range(1, 151))  # none twice, none left out


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (["compare.prompts=empty.jsonl"], DataError, "empty.jsonl has 0 rows"),
        (["compare.prompts=pears.jsonl"], AlignkitError, "pairs.jsonl"),
        (
            ["rewards=[]", "compare.overrides={}", "compare.grid={dpo: {beta: 1.0}}"],
            ConfigError,
            "set compare.score.0.function",
        ),
        (["data.eval=null"], ConfigError, "set compare.prompts (or data.eval) to a file"),
        (
            ["compare.grid.dpo.alpha=1"],
            ConfigError,
            "`compare.grid.dpo.alpha=1`: `compare.grid.dpo.alpha` is not a field of",
        ),
        (
            ["compare.overrides.dpo.model.name_or_path=other"],
            ModelError,
            "models with different tokenizers cannot be compared",
        ),
        (
            ["compare.grid={nash_md: {beta: 0.1}}", "compare.overrides={}"],
            ConfigError,
            "this objective needs `judge`",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(world, trained, changes, error, words):
    Path("empty.jsonl").touch()
    other = shutil.copytree("model", "other")
    tokenizer = json.loads((Path(other) / "tokenizer.json").read_text())
    words_of = tokenizer["model"]["vocab"].items()
    tokenizer["model"]["vocab"] = {
        f"x{word}" if word.startswith("w") else word: i for word, i in words_of
    }
    (Path(other) / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(error) as caught:
        compare(load_recipe("mine.yaml", changes))
    assert words in str(caught.value)
    assert not trained


def test_the_shipped_comparison_can_run(shared, monkeypatch):
    recipe = load_recipe("compare", ["data.train=task:reviews_small"])
    points = expand(recipe)
    check_points(recipe, points)
    assert len(points) == 24
    assert [p.label for p in points[::3]] == [
        "dpo",
        "fdpo",
        "hdpo",
        "radpo",
        "kl_ppo",
        "rpg",
        "nash_md",
        "egpo",
    ]
    monkeypatch.chdir(Path(module.__file__).resolve().parents[2])
    stories = load_recipe("compare_stories", [f"model.name_or_path={shared / 'stories260k'}"])
    check_points(stories, expand(stories))
    assert [p.label for p in expand(stories)[::3]] == ["dpo", "hdpo", "ipo", "rpg"]
    assert all(Path(p.recipe.data.train).is_file() for p in expand(stories))


def test_a_recipe_without_the_section_is_refused(world):
    with pytest.raises(ConfigError, match="has no `compare` section"):
        compare(load_recipe("dpo"))
