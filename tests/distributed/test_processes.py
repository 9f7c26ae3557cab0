"""Two processes are one: losses, weights, sample order, shards, a checkpoint of two on one, and
ranks that break or die.
"""

import json

import ddp_online_worker
import ddp_worker
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from two_processes import on_two_processes
from world import save_model

from alignkit.errors import ConfigError
from alignkit.files import read_jsonl
from alignkit.training import checkpoint

SAME = (
    "loss",
    "grad_norm",
    "rewards/margins",
    "rewards/accuracies",
    "kl",
    "reward",
    "eval_loss",
    "tokens",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Every case on one process and on two."""
    model = save_model(tmp_path_factory.mktemp("model"))
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    ddp_worker.run("adamw", model, one)  # which two processes take up
    with on_two_processes(ddp_worker.__file__, model, one, two):
        for case in ddp_worker.CASES:
            if case != "adamw":
                ddp_worker.run(case, model, one)
        ddp_online_worker.run(model, two / "online" / "alone")
    return model, one, two


@pytest.mark.parametrize("case", ddp_worker.CASES)
def test_two_processes_are_one(finished, case):
    """Losses to 1e-6 (shards: 1e-5); weights to 1e-6 with SGD, as Adam enlarges rounding."""
    _, one, two = finished
    tolerance = 1e-5 if case.startswith("fsdp") else 1e-6
    rows, others = (read_jsonl(out / case / "metrics.jsonl") for out in (one, two))
    for a, b in zip(rows, others, strict=True):
        for name in set(SAME) & a.keys():
            relative = 0 if name == "loss" else 1e-5
            assert b[name] == pytest.approx(a[name], abs=tolerance, rel=relative), (name, a["step"])
    drawn, others = (read_jsonl(out / case / "samples.jsonl") for out in (one, two))
    assert [row["step"] for row in drawn] == [row["step"] for row in others] == [0, 4]
    assert others[0]["logit"] == pytest.approx(drawn[0]["logit"], abs=1e-5)
    if ddp_worker.CASES[case][1].get("optimizer") == "sgd":
        first, second = (load_file(out / f"{case}.safetensors") for out in (one, two))
        for name in first:
            torch.testing.assert_close(second[name], first[name], atol=1e-6, rtol=0)


def losses(folder):
    return {row["step"]: row["loss"] for row in read_jsonl(folder / "metrics.jsonl")}


@pytest.mark.parametrize("case", ["adamw", "fsdp_dpo", "fsdp_rpg", "fsdp_budgets"])
def test_a_checkpoint_of_two_goes_on_on_one(finished, tmp_path, case):
    model, _, two = finished
    ddp_worker.take_up(case, two, tmp_path)
    ddp_worker.run(case, model, tmp_path, "auto")
    tolerance = 1e-5 if case.startswith("fsdp") else 1e-6
    assert losses(tmp_path / case) == pytest.approx(losses(two / case), abs=tolerance)
    assert list(losses(tmp_path / case)) == [1, 2, 3, 4]


def test_a_checkpoint_of_one_goes_on_on_two(finished):
    """Rows are random: one in another place would change the loss."""
    _, one, two = finished
    assert losses(two / "more" / "adamw") == pytest.approx(losses(one / "adamw"), abs=1e-6)
    assert list(losses(two / "more" / "adamw")) == [1, 2, 3, 4]


def test_a_rank_whose_whole_rollout_is_dropped_takes_part(finished):
    """Beside `test_two_processes_are_one`: four of five prompts, all of the second rank's, were
    dropped in each step.
    """
    _, _, two = finished
    assert [row["rollout/dropped"] for row in read_jsonl(two / "dropped" / "metrics.jsonl")] == [
        0.8
    ] * 4


def test_a_rank_that_draws_nothing_beside_its_pilot_takes_part(finished):
    """Beside `test_two_processes_are_one`: one of two prompts never passed, so that its rank drew
    nothing more while the other drew with a sharded model.
    """
    _, _, two = finished
    rows = read_jsonl(two / "fsdp_budgets" / "metrics.jsonl")
    assert any(row["rollout/never_passed"] == 0.5 for row in rows)


def test_resume_in_the_middle_of_a_rollout_is_bit_equal_on_two_processes(finished):
    online = finished[2] / "online"
    whole, resumed = (
        load_file(online / name / "weights.safetensors") for name in ("whole", "resumed")
    )
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert losses(online / "resumed") == losses(online / "whole")


def test_two_processes_sample_and_learn_as_one(finished):
    online = finished[2] / "online"
    for one, two in zip(
        *(read_jsonl(online / name / "metrics.jsonl") for name in ("alone", "whole")), strict=True
    ):
        for name in ("reward", "completions/mean_length", "loss", "grad_norm", "credit/beta"):
            assert two[name] == pytest.approx(one[name], abs=2e-6, rel=1e-5), (name, one["step"])


def test_a_rollout_of_two_processes_goes_on_on_one(finished):
    model, online = finished[0], finished[2] / "online"
    ddp_online_worker.copy_checkpoint(online / "whole", online / "fewer")
    ddp_online_worker.run(model, online / "fewer", "auto")
    assert losses(online / "fewer") == pytest.approx(losses(online / "whole"), abs=2e-6, rel=1e-5)


def test_a_sharded_policy_is_saved_whole(finished):
    _, one, two = finished
    first, second = (
        load_file(out / "fsdp_dpo" / "model" / "model.safetensors") for out in (one, two)
    )
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ddp_worker.BREAKS)
def test_what_breaks_on_one_rank_stops_all_in_the_same_step(finished, name):
    _, _, two = finished
    broken, _, _, code, words = ddp_worker.BREAKS[name]
    for rank in (0, 1):
        ended, message = json.loads((two / f"{name}-{rank}.json").read_text())
        assert ended == code
        assert words in message
        if name not in ("a_log_prob", "the_memory"):  # which have sentences of their own
            assert (f"on rank {broken}: " in message) == (rank != broken)
    assert checkpoint.steps(two / name / "checkpoints")[-1] == ddp_worker.BROKEN_STEP - 1
    if name == "a_log_prob":
        assert message.startswith("step 3: ")
        assert "The last good checkpoint is step-2" in message


def test_a_signal_to_one_rank_stops_all_after_a_checkpoint(finished):
    _, _, two = finished
    for rank in (0, 1):
        code, message = json.loads((two / f"a_signal-{rank}.json").read_text())
        assert (code, message) == (
            143,
            "stopped by signal 15 after step 3; go on with --resume auto",
        )
    assert [(v.step, v.reason) for v in checkpoint.verify(two / "a_signal" / "checkpoints")] == [
        (3, None)
    ]


def test_a_slow_rank_is_named(finished):
    _, _, two = finished
    (code, said), (late_code, _) = (
        json.loads((two / f"a_slow_rank-{rank}.json").read_text()) for rank in (0, 1)
    )
    assert (code, late_code) == (7, 7)
    assert said.startswith(
        "step 3: rank 1 is slow, stuck or gone: the others waited for train.process_timeout."
    )
    assert "The last good checkpoint is step-2" in said


def test_accelerates_fsdp_is_refused_where_it_would_be_ignored(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    job = ddp_worker.dpo(finished[0], tmp_path, Accelerator(cpu=True))
    with pytest.raises(ConfigError, match=r"did not shard the policy.*train\.shard=true"):
        job.pair.prepare(job.accelerator, torch.optim.SGD)
