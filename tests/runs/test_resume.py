"""Taking a run up again: what may change and what may not, which checkpoint is the best, and what a
full disk leaves behind.
"""

import random
import shutil
import time

import pytest
import torch
from safetensors import SafetensorError
from world import make_job, pair_rows, pairs, save_model, write_rows

from alignkit.config.recipe import load_recipe
from alignkit.errors import CheckpointError, ConfigError, DataError, ResourceError
from alignkit.files import read_jsonl
from alignkit.objectives.preference.dpo import DPO
from alignkit.policies import slices
from alignkit.runs.launch import run_recipe
from alignkit.runs.resume import identity_of
from alignkit.training import checkpoint
from alignkit.training.loop import train
from alignkit.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, pairs, and a run whose last act (writing model/) is undone."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    write_rows(folder / "pairs.jsonl", pair_rows(8))
    run_recipe(recipe(folder, folder / "run"))
    (folder / "run" / "model").rename(folder / "finished")
    return folder


def recipe(world, out, *overrides):
    paths = [
        f"model.name_or_path={world / 'model'}",
        f"data.train={world / 'pairs.jsonl'}",
        f"output_dir={out}",
    ]
    settings = "train.steps=3 train.batch_size=4 train.save_every=1 train.eval_every=0 train.log_samples_every=0"
    return load_recipe("dpo", [*paths, *settings.split(), *overrides])


def swapped_words(folder, world):
    """The same model with a tokenizer in which two unused words have changed places."""
    shutil.copytree(world / "model", folder)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(
        text.replace('"w21"', '"x"').replace('"w22"', '"w21"').replace('"x"', '"w22"')
    )
    return folder


def other_rows(folder, world):
    lines = (world / "pairs.jsonl").read_text().splitlines()
    folder.write_text("\n".join(reversed(lines)) + "\n")
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (lambda world, tmp: ["train.learning_rate=0.1"], r"train\.learning_rate: 0\.0005 -> 0\.1"),
        (lambda world, tmp: ["objective.beta=0.7"], r"objective\.beta: .* -> 0\.7"),
        (lambda world, tmp: ["objective={name: ipo}"], r"objective\.name: dpo -> ipo"),
        (lambda world, tmp: ["model.adapter.r=4"], r"model\.adapter"),
        (
            lambda world, tmp: [f"data.train={other_rows(tmp / 'other.jsonl', world)}"],
            r"rows: \w{64} -> \w{64}",
        ),
        (
            lambda world, tmp: [f"model.name_or_path={swapped_words(tmp / 'm', world)}"],
            r"model\.name_or_path",
        ),
    ],
)
def test_another_run_is_refused_with_its_differences(world, tmp_path, changes, words):
    before = sorted((world / "run").rglob("*"))
    with pytest.raises(
        CheckpointError, match=f"step-2 belongs to another run: .*{words}.*Undo the change"
    ):
        run_recipe(recipe(world, world / "run", *changes(world, tmp_path)), "auto")
    assert sorted((world / "run").rglob("*")) == before


def test_a_checkpoint_that_is_not_there_is_named_and_leaves_no_folder(world, tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no checkpoint folder .*step-9"):
        run_recipe(recipe(world, tmp_path / "run"), str(tmp_path / "step-9"))
    assert not (tmp_path / "run").exists()


def test_rows_that_are_held_out_from_a_resumption_on_have_their_own_metric(world, tmp_path):
    """The best so far starts empty, whatever the sets are called; one that is gone is refused."""
    out = tmp_path / "run"
    shutil.copytree(world / "run", out)
    sets = f"data.eval={{near: {write_rows(tmp_path / 'near.jsonl', pair_rows(10)[8:])}}}"
    more = ["train.eval_every=1", "train.steps=4"]
    run_recipe(recipe(world, out, sets, *more), resume="auto")
    assert load_recipe(out / "recipe.yaml").train.metric == "eval_near_loss"
    rows = read_jsonl(out / "metrics.jsonl")
    assert ["eval_near_loss" in row for row in rows] == [False, False, True, True]
    assert checkpoint.best_step(out / "checkpoints") in (3, 4)

    before = (out / "metrics.jsonl").read_bytes()
    for other in (sets.replace("near:", "far:"), f"data.eval={tmp_path / 'near.jsonl'}"):
        with pytest.raises(
            ConfigError, match=r"run: `train.metric` is `eval_near_loss`.* another output_dir"
        ):
            run_recipe(recipe(world, out, other, *more, "train.steps=5"), resume="auto")
    assert (out / "metrics.jsonl").read_bytes() == before


def test_the_best_by_the_metric_of_rows_that_are_gone_is_no_longer_the_best(world, tmp_path):
    """Held-out rows go and others come, on which no step is as good as the best was on the former;
    or the former come back, and are what the best so far was measured by.
    """
    rows = pair_rows(16)[8:]
    near = write_rows(tmp_path / "near.jsonl", rows)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    far = write_rows(tmp_path / "far.jsonl", swapped)
    more = ["train.keep=9", "train.eval_every=1", "train.learning_rate=0.01"]
    out = tmp_path / "run"
    run_recipe(recipe(world, out, *more, f"data.eval={{near: {near}}}"))
    best = checkpoint.best_step(out / "checkpoints")

    back = tmp_path / "back"
    shutil.copytree(out, back)
    # It ends before it saves, so that its recipe alone knows of no held-out rows.
    run_recipe(recipe(world, back, *more, "train.steps=4", "train.save_every=0"), resume="auto")
    again = recipe(world, back, *more, "train.steps=5", f"data.eval={{near: {near}}}")
    run_recipe(again, resume="auto")
    assert load_recipe(back / "recipe.yaml").train.metric == "eval_near_loss"

    run_recipe(recipe(world, out, *more, "train.steps=5"), resume="auto")
    assert checkpoint.best_step(out / "checkpoints") == best
    other = recipe(world, out, *more, "train.steps=7", f"data.eval={{far: {far}}}")
    run_recipe(other, resume="auto")
    assert checkpoint.best_step(out / "checkpoints") > best


def test_another_tokenizer_in_the_same_place_is_refused(world, tmp_path):
    folder = world / "model"
    folder.rename(tmp_path / "model")
    try:
        swapped_words(folder, tmp_path)
        with pytest.raises(CheckpointError, match=r"tokenizer: \w{64} -> \w{64}"):
            run_recipe(recipe(world, world / "run"), "auto")
    finally:
        shutil.rmtree(folder)
        (tmp_path / "model").rename(folder)


def test_another_objective_or_other_data_are_named_before_what_they_lack(world, tmp_path):
    """Unpaired rows cannot be read as pairs, but what matters is that the run had others."""
    with pytest.raises(CheckpointError, match=r"step-2 belongs to .*objective\.name: dpo -> kto"):
        run_recipe(recipe(world, world / "run", "objective={name: kto}"), "auto")

    row = {"prompt": "w1", "completion": "w2", "label": True}
    unpaired = write_rows(tmp_path / "unpaired.jsonl", [row] * 8)
    with pytest.raises(CheckpointError, match=r"belongs to another run: data\.train: .*unpaired"):
        run_recipe(recipe(world, world / "run", f"data.train={unpaired}"), "auto")

    shutil.copy(world / "pairs.jsonl", tmp_path / "pairs.jsonl")
    start = recipe(world, tmp_path / "run", f"data.train={tmp_path / 'pairs.jsonl'}")
    run_recipe(start)
    (tmp_path / "run" / "model").rename(tmp_path / "finished")
    write_rows(tmp_path / "pairs.jsonl", [row] * 8)
    with pytest.raises(DataError, match="trained on other rows of this name"):
        run_recipe(start, "auto")


def test_what_may_change_is_told(world, tmp_path, capsys):
    shutil.copytree(world / "run", tmp_path / "run")
    shutil.copy(world / "pairs.jsonl", tmp_path / "moved.jsonl")  # the same rows, elsewhere
    changed = recipe(
        world, tmp_path / "run", "train.save_every=2", f"data.train={tmp_path / 'moved.jsonl'}"
    )
    assert run_recipe(changed, "auto").resumed_from == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "train.save_every: 1 -> 2" in said
    assert "changed since this run began: data.train: " in said
    assert "resumed from step-2" in said


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def run(job, resume=None):
    with job.run:
        return train(job, resume), job.pair.state()


def test_the_best_checkpoint_is_kept_beside_the_newest(model, tmp_path):
    """Evaluated on the same pairs swapped, every step after the first evaluation is worse than it."""
    swapped = [type(b)(b.prompt, b.completions[::-1], b.masks[::-1], b.uid) for b in pairs(8)]
    settings = {"steps": 6, "save_every": 1, "keep": 1, "eval_every": 2, "evaluation": swapped}
    run(make_job(model, tmp_path, DPO(), pairs(8), **settings))
    kept = [(v.step, v.reason, v.best) for v in checkpoint.verify(tmp_path / "checkpoints")]
    assert kept == [(2, None, True), (5, None, False)]


def test_the_last_step_can_be_the_best(model, tmp_path):
    run(
        make_job(
            model,
            tmp_path,
            DPO(),
            pairs(8),
            steps=4,
            save_every=3,
            eval_every=2,
            evaluation=pairs(8),
        )
    )
    assert [(v.step, v.best) for v in checkpoint.verify(tmp_path / "checkpoints")] == [
        (3, False),
        (4, True),
    ]


def test_a_disk_that_fills_up_in_the_middle(model, tmp_path, monkeypatch):
    _, expected = run(make_job(model, tmp_path / "a", DPO(), pairs(8), save_every=1))
    save_file, saves = slices.save_file, []

    def full(tensors, path, **options):
        saves.append(path)
        if len(saves) > 8:  # in the middle of the third checkpoint
            path.write_bytes(b"half")
            raise SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
        save_file(tensors, path, **options)

    monkeypatch.setattr(slices, "save_file", full)
    with pytest.raises(
        CheckpointError, match=r"No space left on device.*older checkpoints are untouched"
    ) as caught:
        run(make_job(model, tmp_path / "b", DPO(), pairs(8), save_every=1))
    assert caught.value.exit_code == 6
    found = checkpoint.verify(tmp_path / "b" / "checkpoints")
    assert [(v.step, v.reason) for v in found] == [
        (step, None) for step in range(1, len(found) + 1)
    ]
    assert len(list((tmp_path / "b" / "checkpoints").iterdir())) == len(found) > 0
    monkeypatch.setattr(slices, "save_file", save_file)
    result, weights = run(make_job(model, tmp_path / "b", DPO(), pairs(8), save_every=1), "auto")
    assert result.resumed_from == found[-1].step
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_logs_and_models_that_cannot_be_written_are_said(model, tmp_path):
    (tmp_path / "a").mkdir()
    with RunFolder(tmp_path / "a") as folder:
        folder.metrics_file.mkdir()
        with pytest.raises(
            ResourceError, match=r"cannot write .*metrics\.jsonl: Is a directory; free space"
        ):
            folder.log({"step": 1})

        def full(path):
            (path / "half").touch()
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        with pytest.raises(ResourceError, match=r"cannot write .*model: .*No space left on device"):
            folder.save_model(full, "card")
        assert not folder.finished
        assert not (tmp_path / "a" / ".tmp-model").exists()


def test_a_clock_that_jumps_changes_nothing(model, tmp_path, monkeypatch):
    _, expected = run(make_job(model, tmp_path / "a", DPO(), pairs(8), save_every=2))
    monkeypatch.setattr(time, "time", lambda: random.Random().uniform(-1e9, 1e10))
    _, weights = run(make_job(model, tmp_path / "b", DPO(), pairs(8), save_every=2))
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    rows, others = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in "ab")
    assert [r["loss"] for r in rows] == [r["loss"] for r in others]
    assert all(row["time"] < 60 for row in others)


def test_fields_that_decide_about_rows_leave_older_checkpoints_valid():
    """Rows are compared themselves, so most fields of `data` that came later are not part of what
    tells runs apart. The others are no difference at their defaults (`test_identity.py`).
    """
    assert set(identity_of(load_recipe("dpo"))["data"]) == {
        "split",
        "subset",
        "columns",
        "chat_template",
        "max_length",
        "append_eos",
        "split_special_tokens",
        "on_bad_row",
        "control",
        "step_separator",
        "reweigh",
        "rewrite",
    }
