"""What is not finite stops the run in its step, names itself and its rows, and leaves the weights
of the step before.
"""

import json
import random

import numpy
import pytest
import torch
from world import make_job, pairs, save_model

from alignkit.errors import NumericsError, ResourceError
from alignkit.files import read_jsonl
from alignkit.objectives.preference.dpo import DPO
from alignkit.objectives.preference.hinge import Hinge
from alignkit.objectives.preference.kto import KTO
from alignkit.training import checkpoint
from alignkit.training.loop import train
from alignkit.training.snapshot import random_state, seed_everything, set_random_state

BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def spoil(job, steps, change):
    """Apply `change` to the log-probs of the first micro-batch of each of `steps` (counted from 1)."""
    collect, logps, left = job.source.collect, job.pair.logps, set()

    def starts(step, half):
        left.update({step + 1} & set(steps))
        return collect(step, half)

    def spoilt(bundles, plan, **options):
        tokens = logps(bundles, plan, **options)
        if left:
            left.clear()
            change(tokens, bundles)
        return tokens

    job.source.collect, job.pair.logps = starts, spoilt
    return job


def put(name, value, row, where=None):
    """A change that sets one number of completion `row` and notes in `where` whose it is."""

    def change(tokens, bundles):
        tokens.get(name).data[row, 0] = value
        (where if where is not None else []).append(
            [b.uid for b in bundles for _ in b.completions][row]
        )

    return change


def run(job, resume=None):
    with job.run:
        return train(job, resume)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", ["policy", "reference"])
def test_a_log_prob_that_is_not_finite_stops_the_run(model, tmp_path, name, value):
    """A chosen completion with a reference log-prob of -inf has a hinge loss of 0: only looking at
    the log-probs finds it.
    """
    where = []
    job = spoil(
        make_job(model, tmp_path, Hinge(), pairs(8), save_every=1),
        [3],
        put(name, BAD[value], 2, where),
    )
    with pytest.raises(NumericsError, match=r"^step 3: loss .*Nothing was updated") as caught:
        run(job)
    assert caught.value.exit_code == 5
    assert f"log-probs of `{name}` are not finite at row {where[0]}" in str(caught.value)
    assert str(caught.value).endswith(
        "The last good checkpoint is step-2; --resume auto goes on from it"
    )
    kept = checkpoint.load(tmp_path / "checkpoints" / "step-2").tensors["policy"]
    assert all(torch.equal(value, kept[key]) for key, value in job.pair.state().items())
    assert not (tmp_path / "model").exists()


def test_rows_of_a_coupled_loss_are_named(model, tmp_path):
    """Mismatched pairs stand between the trained rows and the log-probs; names must not slip."""
    rows = pairs(8, k=1, label=lambda i: torch.tensor([i % 2 == 0]))
    where = []
    job = spoil(make_job(model, tmp_path, KTO(), rows), [1], put("reference", torch.nan, 1, where))
    with pytest.raises(NumericsError, match="There is no checkpoint to go on from") as caught:
        run(job)
    assert f"log-probs of `reference` are not finite at row {where[0]};" in str(caught.value)


def test_a_gradient_that_overflows_stops_the_run(model, tmp_path):
    job = make_job(model, tmp_path, DPO(), pairs(8))
    job.pair.parameters()[0].register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(
        NumericsError,
        match=r"gradient norm (inf|nan): no row's own loss is broken: the gradient overflowed",
    ):
        run(job)


@pytest.mark.parametrize("kept", ["checkpoint", "model"])
def test_weights_that_an_update_broke_are_never_kept(model, tmp_path, kept):
    """Loss and gradient of step 3 are finite, lr x gradient is not: only the weights after it show
    it.
    """
    settings = (
        {"save_every": 1, "steps": 6} if kept == "checkpoint" else {"save_every": 2, "steps": 3}
    )
    job = make_job(model, tmp_path, DPO(), pairs(8), optimizer="sgd", keep=1, **settings)
    moved, weight = job.pair.after_step, job.pair.parameters()[-1]
    job.pair.after_step = lambda step: (
        moved(step),
        weight.data.view(-1)[:1].fill_(torch.inf) if step == 3 else None,
    )
    with pytest.raises(
        NumericsError,
        match=r"^step 3: its update left weights that are not finite.*checkpoint is step-2;",
    ):
        run(job)
    assert [(v.step, v.reason) for v in checkpoint.verify(tmp_path / "checkpoints")] == [(2, None)]
    found = checkpoint.load(tmp_path / "checkpoints" / "step-2").tensors["policy"]
    assert all(value.isfinite().all() for value in found.values())
    assert not (tmp_path / "model").exists()


def test_skipping_is_a_policy_with_a_cap(model, tmp_path):
    def job(out, **settings):
        return make_job(model, out, DPO(), pairs(8), save_every=1, keep=9, **settings)

    two = spoil(job(tmp_path / "a", max_skipped_steps=2), [2, 4], put("reference", torch.nan, 0))
    assert run(two).step == 6
    rows = read_jsonl(two.run.metrics_file)
    assert [row.get("skipped") for row in rows] == [None, 1, None, 2, None, None]
    assert [("loss" in row, "grad_norm" in row) for row in rows[:2]] == [
        (True, True),
        (False, False),
    ]
    before, after = (
        checkpoint.load(tmp_path / "a" / "checkpoints" / f"step-{n}").tensors for n in (1, 2)
    )
    for group in ("policy", "optimizer"):
        assert all(torch.equal(before[group][key], value) for key, value in after[group].items())
    # the count survives a restart: one skip before it, two after it are one too many
    one = spoil(job(tmp_path / "b", max_skipped_steps=2), [2], put("reference", torch.nan, 0))
    run(one)
    (tmp_path / "b" / "model").rename(tmp_path / "done")
    for step in (4, 5):
        (tmp_path / "b" / "checkpoints" / f"step-{step}").rename(tmp_path / f"step-{step}")
    three = spoil(job(tmp_path / "b", max_skipped_steps=2), [5, 6], put("reference", torch.nan, 0))
    with pytest.raises(
        NumericsError, match=r"^step 6: .*step-5; .*\(2 steps were skipped before\)"
    ):
        run(three, "auto")


def test_out_of_memory_halves_the_micro_batches_and_changes_no_gradient(model, tmp_path, caplog):
    sgd = {"optimizer": "sgd", "learning_rate": 0.5}
    expected = make_job(model, tmp_path / "a", DPO(beta=0.5), pairs(10), **sgd)
    run(expected)
    job = make_job(model, tmp_path / "b", DPO(beta=0.5), pairs(10), **sgd)
    logps = job.pair.logps

    def small(bundles, plan, **options):
        if len(bundles) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logps(bundles, plan, **options)

    job.pair.logps = small
    run(job)
    assert "train.micro_batch_tokens is" in caplog.text
    for row, other in zip(*(read_jsonl(j.run.metrics_file) for j in (expected, job)), strict=True):
        assert other["loss"] == pytest.approx(row["loss"], abs=1e-6)
        assert other["tokens"] == row["tokens"]
    for key, value in expected.pair.state().items():
        torch.testing.assert_close(job.pair.state()[key], value, atol=1e-6, rtol=0)


def test_out_of_memory_with_one_row_or_while_sampling_names_what_helps(model, tmp_path):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name, part, words in (
        ("logps", "pair", "train.micro_batch_tokens"),
        ("collect", "source", "rollout.completions"),
    ):
        job = make_job(model, tmp_path / name, DPO(), pairs(8))
        setattr(getattr(job, part), name, full)
        with pytest.raises(ResourceError, match=words) as caught:
            run(job)
        assert caught.value.exit_code == 7


def test_every_random_generator_goes_on_where_it_was():
    seed_everything(3)
    random.gauss(0, 1), numpy.random.randn(3), torch.randn(3)
    tensors, state = random_state()
    expected = [
        random.gauss(0, 1),
        random.random(),
        *numpy.random.randn(2),
        *torch.randn(2).tolist(),
    ]
    seed_everything(4)
    set_random_state(tensors, json.loads(json.dumps(state)))
    assert [
        random.gauss(0, 1),
        random.random(),
        *numpy.random.randn(2),
        *torch.randn(2).tolist(),
    ] == expected
