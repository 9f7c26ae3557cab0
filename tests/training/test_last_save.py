"""The end of a run: a disk that refuses the model, an early stop whose best step is damaged, a kill
while the model is written.
"""

import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from world import make_job, pairs, save_model

from alignkit.errors import ResourceError
from alignkit.files import read_jsonl
from alignkit.objectives.preference.dpo import DPO
from alignkit.policies import slices
from alignkit.training import checkpoint
from alignkit.training.loop import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def job_of(model, out, **settings):
    return make_job(model, out, DPO(), pairs(8), **{"steps": 3, "save_every": 100, **settings})


def run(job, resume=None):
    with job.run:
        return train(job, resume)


def full_disk(*_, **__):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def refuse_below(folder, save):
    """`save`, but nothing fits below `folder`."""

    def refusing(path, **options):
        if Path(path).is_relative_to(folder):
            full_disk()
        return save(path, **options)

    return refusing


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


def test_a_full_disk_at_the_end_loses_nothing(model, tmp_path):
    """Fewer steps than `save_every`: the last step is saved before the model is written."""
    run(job_of(model, tmp_path / "whole"))
    job = job_of(model, tmp_path / "run")
    job.pair.save = refuse_below(tmp_path, full_disk)
    with pytest.raises(ResourceError, match="The last good checkpoint is step-3"):
        run(job)

    result = run(job_of(model, tmp_path / "run"), "auto")
    assert result.step == 3
    assert weights_of(tmp_path / "run" / "model") == weights_of(tmp_path / "whole" / "model")


@pytest.mark.parametrize("fits_elsewhere", [True, False])
def test_without_a_checkpoint_nobody_is_told_to_resume(
    model, tmp_path, monkeypatch, fits_elsewhere
):
    """Neither the checkpoint nor the model fits on the run's disk."""
    run(job_of(model, tmp_path / "whole"))
    monkeypatch.setattr(slices, "save_file", full_disk)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    job = job_of(model, tmp_path / "run")
    job.pair.save = refuse_below(tmp_path / "run" if fits_elsewhere else tmp_path, job.pair.save)

    with pytest.raises(ResourceError, match="There is no checkpoint to go on from") as caught:
        run(job)
    assert "resume" not in str(caught.value)
    rescued = list(tmp_path.glob("alignkit-run-*"))
    assert [str(folder) in str(caught.value) for folder in rescued] == [True] * fits_elsewhere
    for folder in rescued:
        assert weights_of(folder) == weights_of(tmp_path / "whole" / "model")


EARLY = {"steps": 12, "save_every": 1, "keep": 3, "eval_every": 2, "early_stopping": 2}


def early_job(model, out):
    """Evaluated on the same pairs swapped: every evaluation after the first is worse."""
    swapped = [type(b)(b.prompt, b.completions[::-1], b.masks[::-1], b.uid) for b in pairs(8)]
    return job_of(model, out, evaluation=swapped, **EARLY)


def killed_while_the_model_is_written(model, out):
    job = early_job(model, out)

    def die(*_, **__):
        raise KeyboardInterrupt

    job.pair.save = die
    with pytest.raises(KeyboardInterrupt):
        run(job)


def test_a_run_killed_after_its_early_stop_ends_the_same(model, tmp_path):
    whole = run(early_job(model, tmp_path / "whole"))
    assert whole.stopped_early
    killed_while_the_model_is_written(model, tmp_path / "run")
    resumed = run(early_job(model, tmp_path / "run"), "auto")

    assert (resumed.step, resumed.stopped_early) == (whole.step, True)
    assert weights_of(tmp_path / "run" / "model") == weights_of(tmp_path / "whole" / "model")
    losses = [
        [row["loss"] for row in read_jsonl(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "run")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("all_damaged", [False, True])
def test_a_damaged_best_step_is_replaced_by_the_newest(model, tmp_path, capsys, all_damaged):
    job = early_job(model, tmp_path)
    save = checkpoint.check

    def damage_first(path):
        """The damage happens between the last save and the end."""
        for folder in (tmp_path / "checkpoints").glob("step-*"):
            if folder.name == path.name or all_damaged:
                (folder / "policy.safetensors").write_bytes(b"damaged")
        checkpoint.check = save
        return save(path)

    finish = job.run.log

    def log(row):
        finish(row)
        if row["step"] == 6:
            checkpoint.check = damage_first

    job.run.log = log
    try:
        result = run(job)
    finally:
        checkpoint.check = save

    assert result.stopped_early
    assert job.run.finished
    shown = capsys.readouterr().err
    assert "step-2, is damaged: policy.safetensors has 7 bytes" in shown
    if not all_damaged:
        newest, _ = checkpoint.newest(tmp_path / "checkpoints")
        assert f"model/ is step {newest.step} instead" in shown
        assert all(
            torch.equal(value, newest.tensors["policy"][name])
            for name, value in job.pair.state().items()
        )
