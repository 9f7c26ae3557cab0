"""What a repeated comparison may go on with: results belong to the content of models, rows and
rewards, folders belong to somebody, files may be damaged.
"""

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from rich.console import Console
from world import pair_rows, run, save_model, write_rows

from alignkit.comparison import measurement, single_run
from alignkit.comparison.compare import check_points, compare, with_inputs
from alignkit.comparison.folder import check_folder
from alignkit.comparison.grid import expand
from alignkit.comparison.measurement import DamagedFileError, Measurement
from alignkit.comparison.run_state import RunState, read_run_state, stale_runs
from alignkit.config.recipe import load_recipe
from alignkit.errors import CheckpointError, ConfigError, ResourceError
from alignkit.runs import launch
from alignkit.runs.inputs import content_hash

HELPERS = """
def score(prompts, completions, **columns):
    return [float("w5" in c) for c in completions]
"""
RECIPE = """\
model: {name_or_path: model}
data: {train: pairs.jsonl, eval: held_out.jsonl}
train: {steps: 2, batch_size: 4, warmup_steps: 0, save_every: 1, log_samples_every: 0}
rollout: {completions: 2, max_new_tokens: 3}
rewards: [{function: "helpers.py:score"}]
compare:
  grid:
    dpo: {beta: 0.1}
    rloo: {beta: 0.5}
  samples: 2
  base_samples: 2
  best_of: [2]
  workers: 0
"""
OUT = Path("runs/mine")


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    Path("helpers.py").write_text(HELPERS)
    write_rows(Path("pairs.jsonl"), pair_rows(8))
    write_rows(Path("held_out.jsonl"), pair_rows(12)[8:])
    Path("mine.yaml").write_text(RECIPE)
    return tmp_path


def planned(changes=()):
    """The points of the recipe as `compare` ties them to their inputs."""
    recipe = load_recipe("mine.yaml", changes)
    points = expand(recipe)
    return [with_inputs(*each) for each in zip(points, check_points(recipe, points))]


def pretend(status, *, checkpoints=True, changes=()):
    """Run folders of every point as training leaves them, without training."""
    for point in planned(changes):
        folder = Path(point.recipe.output_dir)
        model = shutil.copytree("model", folder / "model") if status == "finished" else ""
        if checkpoints:
            (folder / "checkpoints" / "step-1").mkdir(parents=True)
        state = RunState(status, settings=point.settings, inputs=dict(point.inputs))
        RunState(**{**vars(state), "model": content_hash(Path(model)) if model else ""}).write(
            folder
        )


def swap_labels():
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    swapped = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    write_rows(Path("pairs.jsonl"), swapped)


def swap_base():
    save_model(Path("model"), seed=1)


def swap_reward():
    Path("helpers.py").write_text(HELPERS.replace("w5", "w6"))


SWAPS = [
    (swap_labels, "data.train (pairs.jsonl) has another content", ["dpo-seed=0", "rloo-seed=0"]),
    (swap_base, "model.name_or_path (model) has another content", ["dpo-seed=0", "rloo-seed=0"]),
    (swap_reward, "rewards.0.function (helpers.py:score) has another", ["rloo-seed=0"]),
]


@pytest.mark.parametrize(("swap", "words", "names"), SWAPS)
def test_finished_runs_of_other_inputs_are_stale(world, swap, words, names):
    pretend("finished")
    assert stale_runs(planned()) == {}
    swap()
    stale = stale_runs(planned())
    assert list(stale) == names
    assert all(words in reason for reason in stale.values())


def test_a_model_that_was_replaced_is_stale(world):
    pretend("finished")
    file = OUT / "runs/dpo-seed=0/model/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert stale_runs(planned()) == {
        "dpo-seed=0": "its model/ is not the one that was trained",
    }


@pytest.mark.parametrize(("swap", "words", "names"), SWAPS)
def test_unfinished_runs_of_other_inputs_are_kept_and_refused(world, swap, words, names):
    pretend("started")
    swap()
    with pytest.raises(CheckpointError) as caught:
        stale_runs(planned())
    assert words in str(caught.value)
    assert names[0] in str(caught.value)
    assert len(list(OUT.glob("runs/*/checkpoints/step-1"))) == 2


@pytest.mark.parametrize("status", ["started", "failed"])
@pytest.mark.parametrize(
    "change",
    [
        "train.learning_rate=1",
        "compare.grid.dpo.label_smoothing=0.1",
        "compare.overrides.dpo.train.steps=9",
    ],
)
def test_an_interrupted_comparison_with_a_changed_override_is_refused(world, status, change):
    pretend(status)
    before = sorted(map(str, OUT.rglob("*")))
    assert run("compare", "mine.yaml", change) == 2
    with pytest.raises(ConfigError, match=r"holds an unfinished run.* -> "):
        stale_runs(planned([change]))
    after = sorted(map(str, OUT.rglob("*")))
    assert [path for path in after if not path.endswith(".lock")] == before


def test_a_run_that_left_nothing_may_begin_again_with_other_settings(world):
    pretend("failed", checkpoints=False)
    swap_labels()
    assert stale_runs(planned(["train.steps=9"])) == {}


def test_a_stale_run_is_named_and_not_shown_beside_the_rest(world, monkeypatch):
    trained = []
    real = launch.run_recipe
    monkeypatch.setattr(
        launch, "run_recipe", lambda r, *a, **k: trained.append(r.output_dir) or real(r, *a, **k)
    )
    first = compare(load_recipe("mine.yaml"))
    assert [row["status"] for row in first["runs"]] == ["finished"] * 2
    outcome = json.loads((OUT / "runs/dpo-seed=0/outcome.json").read_text())
    assert outcome["model"] == content_hash(OUT / "runs/dpo-seed=0/model")
    assert "data.train (pairs.jsonl)" in outcome["inputs"]

    del trained[:]
    swap_reward()
    with (OUT / "console.txt").open("w") as file:
        results = compare(load_recipe("mine.yaml"), console=Console(file=file))
    said = (OUT / "console.txt").read_text()
    assert "rloo-seed=0 is stale and left out: rewards.0.function (helpers.py:score)" in said
    assert trained == []
    assert [row["status"] for row in results["runs"]] == ["finished", "stale"]
    assert [curve["label"] for curve in results["curves"]] == ["dpo"]
    assert list(results["samples_shown"]["runs"]) == ["dpo"]
    assert "`rloo-seed=0` is stale and left out" in (OUT / "report.md").read_text()
    # The score is measured anew, also of the base model.
    assert results["base"]["score"] != first["base"]["score"]

    for swap in (swap_labels, swap_base):
        before = (OUT / "results.json").read_bytes()
        swap()
        with pytest.raises(CheckpointError, match="no run in runs/mine/runs is of this comparison"):
            compare(load_recipe("mine.yaml"))
        assert (OUT / "results.json").read_bytes() == before
        assert trained == []


@pytest.mark.parametrize("name", ["results.json", "README.md", "recipe.yaml", "runs/x/notes"])
def test_a_folder_of_somebody_else_is_left_alone(world, name):
    file = OUT / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    assert run("compare", "mine.yaml") == 2
    assert run("compare", "mine.yaml", "output_dir=.") == 2
    assert [path for path in OUT.rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "{}"


def test_the_folder_of_an_earlier_version_is_known(tmp_path):
    (tmp_path / "base.json").write_text("[1]")
    with pytest.raises(ConfigError, match="no comparison wrote"):
        check_folder(tmp_path)
    (tmp_path / "base.json").write_text('{"key": "k", "measured": {}}')
    check_folder(tmp_path)
    (tmp_path / "base.json").unlink()
    RunState("started", settings={"a": 1}).write(tmp_path / "runs" / "dpo")
    check_folder(tmp_path)
    check_folder(tmp_path / "missing")


@pytest.mark.parametrize(
    "name",
    [
        "runs", "reference", "report.md", "frontier.png", ".recipe.yaml.tmp", ".results.json.tmp",
        "runs/dpo", "runs/dpo/log.txt", "runs/dpo/model", "runs/dpo/.tmp-model", "runs/dpo/checkpoints",
        "runs/dpo/.outcome.json.tmp", "runs/dpo/checkpoints/step-1",
    ],
)  # fmt: skip
def test_a_planted_link_is_refused(world, name):
    elsewhere = world / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    OUT.mkdir(parents=True)
    (OUT / "comparison.json").write_text('{"alignkit": "comparison"}')
    (OUT / name).parent.mkdir(parents=True, exist_ok=True)
    (OUT / name).symlink_to(elsewhere)
    assert run("compare", "mine.yaml") == 7
    assert [file.name for file in elsewhere.iterdir()] == ["mine"]


def test_a_link_in_the_place_of_a_log_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "log.txt").symlink_to(tmp_path / "mine")
    with (
        pytest.raises(ResourceError, match=r"log\.txt"),
        single_run.printing_into(tmp_path / "log.txt"),
    ):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


BROKEN = [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"key": 1}', b'{"status": 5}', b"[" * 100_000]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_measurement_is_damaged_or_of_another_key(tmp_path, content):
    file = tmp_path / "measured.json"
    file.write_bytes(content)
    with suppress(DamagedFileError):
        assert Measurement.read(file, "key") is None
    file.write_text('{"key": "key", "measured": {}}')
    with pytest.raises(DamagedFileError):
        Measurement.read(file, "key")


@pytest.mark.parametrize("content", [*BROKEN[:5], *BROKEN[6:]])
def test_a_broken_outcome_ends_with_exit_6(world, content):
    file = OUT / "runs/dpo-seed=0/outcome.json"
    pretend("started", checkpoints=False)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"outcome\.json cannot be read"):
        read_run_state(planned()[0])
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_run_state(planned()[0])


def test_damaged_measurements_are_named_and_made_again(world):
    recipe = load_recipe("mine.yaml", ["compare.grid={dpo: {beta: 0.1}}"])
    first = compare(recipe)
    base = OUT / "base.json"
    measured = OUT / "runs/dpo-seed=0/measured.json"
    base.write_bytes(base.read_bytes().replace(b'"kl":', b'"kl" :', 1)[:-40])
    content = json.loads(measured.read_text())
    content["measured"]["score"][0][0] = 99.0
    measured.write_text(json.dumps(content))

    with (OUT / "console.txt").open("w") as file:
        again = compare(recipe, console=Console(file=file))
    said = (OUT / "console.txt").read_text()
    assert "base.json cannot be used" in said
    assert "measured.json cannot be used (it does not match its own SHA-256)" in said
    assert again["runs"][0]["figures"] == first["runs"][0]["figures"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_refuses_is_said(tmp_path, monkeypatch, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("alignkit.files.fsync", full)
    with pytest.raises(ResourceError, match=os.strerror(number)):
        RunState("started").write(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert measurement.BASE_FILE not in os.listdir(tmp_path)


def test_a_grid_has_a_size_that_can_be_run(world):
    """Two lists of 518 and 519 values make 268,842 runs; nothing is made before that is refused."""
    values = [[i / 1000 for i in range(1, n)] for n in (519, 520)]
    Path("mine.yaml").write_text(
        RECIPE.replace(
            "dpo: {beta: 0.1}", f"dpo: {{beta: {values[0]}, label_smoothing: {values[1]}}}"
        )
    )
    with pytest.raises(ConfigError, match=r"the grid has 268,843 runs, at most 1,000 are allowed"):
        expand(load_recipe("mine.yaml"))
