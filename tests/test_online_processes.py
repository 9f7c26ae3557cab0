"""Rollouts on two processes: the same run as on one, and checkpoints that hold every rank's part of the buffer."""

import ddp_online_worker as worker
import pytest
import torch
from safetensors.torch import load_file
from two_processes import on_two_processes
from world import save_model

from alignkit.run import read_lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run on one process and on two; the latter also taken up in the middle of a rollout."""
    model, out = save_model(tmp_path_factory.mktemp("model")), tmp_path_factory.mktemp("runs")
    with on_two_processes(worker.__file__, model, out):
        worker.run(model, out / "alone")
    return model, out


def losses(folder):
    return [row["loss"] for row in read_lines(folder / "metrics.jsonl")]


def test_resume_in_the_middle_of_a_rollout_is_bit_equal_on_two_processes(finished):
    _, out = finished
    whole, resumed = (load_file(out / name / "weights.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert losses(out / "resumed") == losses(out / "whole")


def test_two_processes_sample_and_learn_as_one(finished):
    _, out = finished
    for one, two in zip(*(read_lines(out / name / "metrics.jsonl") for name in ("alone", "whole")), strict=True):
        for name in ("reward", "completions/mean_length", "loss", "grad_norm", "credit/beta"):
            assert two[name] == pytest.approx(one[name], abs=2e-6, rel=1e-5), (name, one["step"])


def test_a_rollout_of_two_processes_goes_on_on_one(finished):
    model, out = finished
    worker.copy_checkpoint(out / "whole", out / "fewer")
    worker.run(model, out / "fewer", "auto")
    assert losses(out / "fewer") == pytest.approx(losses(out / "whole"), abs=2e-6, rel=1e-5)
