"""Two processes are one: losses, weights, sample order, shards, a checkpoint of two on one, and ranks that break or die."""

import json

import ddp_worker
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from two_processes import on_two_processes
from world import save_model

from alignkit import checkpoint
from alignkit.errors import ConfigError
from alignkit.run import read_lines

SAME = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "kl", "reward", "eval_loss", "tokens")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Every case on one process and on two."""
    model = save_model(tmp_path_factory.mktemp("model"))
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    with on_two_processes(ddp_worker.__file__, model, two):
        for case in ddp_worker.CASES:
            ddp_worker.run(case, model, one)
    return model, one, two


@pytest.mark.parametrize("case", ddp_worker.CASES)
def test_two_processes_are_one(finished, case):
    """Losses to 1e-6 (shards: 1e-5); weights to 1e-6 with SGD, as Adam enlarges rounding."""
    _, one, two = finished
    tolerance = 1e-5 if case.startswith("fsdp") else 1e-6
    rows, others = (read_lines(out / case / "metrics.jsonl") for out in (one, two))
    for a, b in zip(rows, others, strict=True):
        for name in set(SAME) & a.keys():
            assert b[name] == pytest.approx(a[name], abs=tolerance, rel=1e-5), (name, a["step"])
    drawn, others = (read_lines(out / case / "samples.jsonl") for out in (one, two))
    assert [row["step"] for row in drawn] == [row["step"] for row in others] == [0, 4]
    assert others[0]["logit"] == pytest.approx(drawn[0]["logit"], abs=1e-5)
    if ddp_worker.CASES[case][1].get("optimizer") == "sgd":
        first, second = (load_file(out / f"{case}.safetensors") for out in (one, two))
        for name in first:
            torch.testing.assert_close(second[name], first[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", ["fsdp_dpo", "fsdp_rpg"])
def test_a_checkpoint_of_two_goes_on_on_one(finished, tmp_path, case):
    model, _, two = finished
    (tmp_path / case / "checkpoints").mkdir(parents=True)
    (two / case / "checkpoints" / "step-2").rename(tmp_path / case / "checkpoints" / "step-2")
    (tmp_path / case / "metrics.jsonl").write_text((two / case / "metrics.jsonl").read_text())
    ddp_worker.run(case, model, tmp_path, "auto")
    rows, others = (read_lines(out / case / "metrics.jsonl") for out in (two, tmp_path))
    assert [r["step"] for r in others] == [1, 2, 3, 4]
    assert [r["loss"] for r in others] == pytest.approx([r["loss"] for r in rows], abs=1e-5)


def test_a_sharded_policy_is_saved_whole(finished):
    _, one, two = finished
    first, second = (load_file(out / "fsdp_dpo" / "model" / "model.safetensors") for out in (one, two))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], atol=1e-4, rtol=0)


def test_a_number_that_breaks_on_one_rank_stops_all_in_the_same_step(finished):
    _, _, two = finished
    for rank in (0, 1):
        code, message = json.loads((two / f"broken-{rank}.json").read_text())
        assert code == 5
        assert message.startswith(f"step {ddp_worker.BROKEN_STEP}: ")
        assert "rank 1: log-probs of `policy` are not finite at row random:" in message
        assert "The last good checkpoint is step-2" in message
    assert checkpoint.steps(two / "broken" / "checkpoints")[-1] == 2


def test_accelerates_fsdp_is_refused_where_it_would_be_ignored(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    job = ddp_worker.dpo(finished[0], tmp_path, Accelerator(cpu=True))
    with pytest.raises(ConfigError, match=r"did not shard the policy.*train\.shard=true"):
        job.pair.prepare(job.accelerator, torch.optim.SGD)
