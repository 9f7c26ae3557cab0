"""The loop: reduction is exact, resume is bit-equal, broken steps stop, signals leave a checkpoint."""

import json
import os
import signal

import pytest
import torch
from world import make_job, pairs, save_model

from alignkit.batches import LossTerms, PairBatch, Plan, Term
from alignkit.config.train import TrainConfig
from alignkit.errors import CheckpointError, ConfigError, NumericsError, ResourceError
from alignkit.files import read_jsonl
from alignkit.objectives.base import Objective
from alignkit.objectives.preference.dpo import DPO
from alignkit.objectives.preference.sft import SFT
from alignkit.training import checkpoint
from alignkit.training.loop import train
from alignkit.training.optimizer import learning_rate
from alignkit.training.signals import Interrupted


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def run(job, resume=None):
    with job.run:
        result = train(job, resume)
    return result, job.pair.state(), read_jsonl(job.run.metrics_file)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "options", [{"budget": 16}, {"budget": 60}, {"layout": "padded"}, {"checkpointing": True}]
)
def test_micro_batches_and_layouts_change_nothing(model, tmp_path, options):
    sgd = {"optimizer": "sgd", "learning_rate": 0.5}
    _, whole, rows = run(make_job(model, tmp_path / "whole", DPO(beta=0.5), pairs(10), **sgd))
    _, parts, others = run(
        make_job(model, tmp_path / "parts", DPO(beta=0.5), pairs(10), **sgd, **options)
    )
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-6, rtol=0)
    for row, other in zip(rows, others, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert other[name] == pytest.approx(row[name], abs=2e-6, rel=1e-5)


class Centred(Objective):
    """A coupled loss: every margin is compared with the mean margin of the whole step."""

    @property
    def plan(self) -> Plan:
        return Plan("pair", coupled=True)

    def loss(self, batch: PairBatch) -> LossTerms:
        margin = batch.chosen.sequence() - batch.rejected.sequence()
        return LossTerms(
            [Term("centred", (margin - margin.mean() - 1) ** 2)], {"m": margin.detach()}
        )


def test_a_coupled_loss_sees_the_whole_step(model, tmp_path):
    sgd = {"optimizer": "sgd", "learning_rate": 0.005, "steps": 3, "max_grad_norm": 0.0}
    _, whole, rows = run(make_job(model, tmp_path / "whole", Centred(), pairs(10), **sgd))
    _, parts, others = run(
        make_job(model, tmp_path / "parts", Centred(), pairs(10), budget=16, **sgd)
    )
    assert [r["loss"] for r in others] == pytest.approx([r["loss"] for r in rows], rel=1e-5)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=2e-6, rtol=0)
    # against autograd through one forward of the whole step
    job = make_job(model, tmp_path / "direct", Centred(), pairs(10), **sgd)
    batch = job.source.collect(0)
    tokens = job.pair.logps(batch, job.objective.plan)
    job.objective.loss(PairBatch.build(batch, tokens)).terms[0].values.mean().backward()
    expected = torch.stack(
        [p.grad.norm() for p in job.pair.parameters() if p.grad is not None]
    ).norm()
    assert rows[0]["grad_norm"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"budget": 16}, {"lora": True, "reference": "adapter_off"}, {"ema_decay": 0.9}]
)
def test_resume_is_bit_equal(model, tmp_path, options):
    settings = {"save_every": 2, "keep": 10, **options}
    _, expected, rows = run(make_job(model, tmp_path / "a", DPO(beta=0.5), pairs(10), **settings))
    for step in (2, 4):
        out = tmp_path / f"b{step}"
        job = make_job(model, out, DPO(beta=0.5), pairs(10), **settings)
        # the uninterrupted run up to `step`, then gone without a word
        (out / "checkpoints").mkdir(parents=True)
        (tmp_path / "a" / "checkpoints" / f"step-{step}").rename(
            out / "checkpoints" / f"step-{step}"
        )
        # one row more than the checkpoint: it is cut off
        lines = [json.dumps(r) for r in rows[: step + 1]]
        (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        result, weights, again = run(job, "auto")
        assert result.resumed_from == step
        assert same(weights, expected)
        assert [r["step"] for r in again] == [r["step"] for r in rows]
        assert [r["loss"] for r in again] == [r["loss"] for r in rows]
        assert [r["tokens"] for r in again] == [r["tokens"] for r in rows]


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(model, tmp_path, capsys):
    _, expected, _ = run(
        make_job(model, tmp_path / "a", DPO(beta=0.5), pairs(10), save_every=2, keep=9)
    )
    folder = tmp_path / "a" / "checkpoints"
    os.truncate(folder / "step-4" / "policy.safetensors", 100)
    (tmp_path / "a" / "model").rename(tmp_path / "finished")
    result, weights, _ = run(
        make_job(model, tmp_path / "a", DPO(beta=0.5), pairs(10), save_every=2, keep=9), "auto"
    )
    assert result.resumed_from == 2
    assert same(weights, expected)
    assert "skipped damaged checkpoint step-4: policy.safetensors has 100 bytes" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_finished_or_foreign_run_is_not_touched(model, tmp_path):
    run(make_job(model, tmp_path, DPO(), pairs(8), save_every=3))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="already holds a run"):
        run(make_job(model, tmp_path, DPO(), pairs(8)))
    # finished: says so and stops
    result, _, _ = run(make_job(model, tmp_path, DPO(), pairs(8)), "auto")
    assert result.step == 6
    (tmp_path / "model").rename(tmp_path.with_name("moved"))
    with pytest.raises(CheckpointError, match=r"config\.learning_rate: 0\.01 -> 0\.02"):
        run(make_job(model, tmp_path, DPO(), pairs(8), learning_rate=0.02), "auto")
    assert all(
        p.read_bytes() == content for p, content in before.items() if "/model/" not in str(p)
    )


def test_two_runs_on_one_folder(model, tmp_path):
    job, other = (make_job(model, tmp_path, DPO(), pairs(8)) for _ in range(2))
    with job.run, pytest.raises(ResourceError, match="in use by another run"), other.run:
        pass
    with other.run:  # the first has let go
        pass


class Breaking(DPO):
    """Not a number for one row from the second time it is seen."""

    def loss(self, batch: PairBatch) -> LossTerms:
        out = super().loss(batch)
        values = out.terms[0].values
        broken = torch.where(batch.chosen.log_ratio.abs().sum(-1) > 0.2, torch.nan, values)
        return LossTerms([Term("dpo", broken)], out.metrics)


def test_a_broken_step_stops_the_run_and_names_term_and_rows(model, tmp_path):
    job = make_job(model, tmp_path, Breaking(), pairs(8), save_every=1)
    with pytest.raises(NumericsError, match=r"term `dpo` is not finite at row random:\d") as caught:
        run(job)
    assert caught.value.exit_code == 5
    assert all(p.isfinite().all() for p in job.pair.parameters())
    assert not (tmp_path / "model").exists()
    assert checkpoint.newest(tmp_path / "checkpoints")[0] is not None


def test_an_overflowing_step_stops_the_run(model, tmp_path):
    job = make_job(
        model,
        tmp_path,
        SFT(),
        pairs(8, k=1),
        learning_rate=1e30,
        optimizer="sgd",
        warmup_steps=0,
        max_grad_norm=0,
    )
    with pytest.raises(NumericsError, match="Nothing was updated"):
        run(job)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_resume_is_bit_equal(model, tmp_path, signum):
    _, expected, _ = run(make_job(model, tmp_path / "a", DPO(), pairs(8)))
    job = make_job(model, tmp_path / "b", DPO(), pairs(8))
    collect = job.source.collect
    job.source.collect = lambda step, half: (
        signal.raise_signal(signum) if step == 3 else None,
        collect(step, half),
    )[1]
    with pytest.raises(Interrupted, match="after step 4") as caught:
        run(job)
    assert caught.value.exit_code == 128 + signum
    result, weights, rows = run(make_job(model, tmp_path / "b", DPO(), pairs(8)), "auto")
    assert result.resumed_from == 4
    assert same(weights, expected)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]


def test_a_signal_in_the_last_step_costs_the_card_no_result(model, tmp_path):
    def job(folder):
        made = make_job(model, folder, DPO(), pairs(8), evaluation=pairs(8), eval_every=2)
        made.card = lambda metrics: json.dumps(
            {name: value for name, value in metrics.items() if name != "time"}
        )
        return made

    whole, _, _ = run(job(tmp_path / "a"))
    interrupted = job(tmp_path / "b")
    collect = interrupted.source.collect
    interrupted.source.collect = lambda step, half: (
        signal.raise_signal(signal.SIGTERM) if step == 5 else None,
        collect(step, half),
    )[1]
    with pytest.raises(Interrupted, match="after step 6"):
        run(interrupted)

    resumed, _, _ = run(job(tmp_path / "b"), "auto")
    card = (tmp_path / "b" / "README.md").read_text()
    assert card == (tmp_path / "a" / "README.md").read_text()
    assert {"loss", "eval_loss", "grad_norm"} <= set(json.loads(card))
    assert resumed.metrics["loss"] == whole.metrics["loss"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"metric": "eval_rewards/accuracies", "metric_goal": "min"},
        {"metric": "eval_rewards/margins"},
        {"metric": "eval_rewards/rejected", "metric_goal": "min"},
    ],
    ids=["auto", "min", "known", "given"],
)
def test_the_goal_of_a_metric_decides_which_step_is_best(model, tmp_path, options):
    """The best step is the one with the least or the most of the metric, as its goal says."""
    job = make_job(
        model, tmp_path, DPO(), pairs(8), steps=7, eval_every=2, save_every=1, evaluation=pairs(8),
        **options,
    )  # fmt: skip
    _, _, rows = run(job)
    metric = options.get("metric", "eval_loss")
    evaluated = {row["step"]: row[metric] for row in rows if metric in row}
    pick = min if options.get("metric_goal") == "min" or metric == "eval_loss" else max
    best = pick(evaluated, key=evaluated.get)  # the first one, where several are equal
    assert checkpoint.best_step(tmp_path / "checkpoints") == best


def test_early_stopping_keeps_the_best(model, tmp_path):
    """Training on pairs and evaluating on the same pairs swapped gets worse at every evaluation but
    the first.
    """
    swapped = [type(b)(b.prompt, b.completions[::-1], b.masks[::-1], b.uid) for b in pairs(8)]
    job = make_job(
        model,
        tmp_path,
        DPO(),
        pairs(8),
        steps=20,
        eval_every=2,
        early_stopping=2,
        evaluation=swapped,
    )
    result, weights, rows = run(job)
    evaluated = [r["eval_loss"] for r in rows if "eval_loss" in r]
    assert result.stopped_early
    assert result.step == 6
    assert evaluated == sorted(evaluated)
    assert same(weights, checkpoint.load(tmp_path / "checkpoints" / "step-2").tensors["policy"])


def test_schedule():
    config = TrainConfig(learning_rate=1.0, warmup_steps=4, schedule="cosine")
    rates = [learning_rate(config, s, 14) for s in range(15)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.5)
    assert rates[14] == pytest.approx(0.0)
    linear = TrainConfig(learning_rate=1.0, warmup_steps=0, schedule="linear")
    assert [learning_rate(linear, s, 4) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_metrics_rows_say_what_the_design_promises(model, tmp_path):
    _, _, rows = run(
        make_job(
            model, tmp_path, DPO(beta=0.5), pairs(8), evaluation=pairs(4, seed=1), eval_every=3
        )
    )
    assert {"step", "time", "loss", "grad_norm", "lr", "tokens"} <= rows[0].keys()
    assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)  # policy = reference: log 2
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert [r["step"] for r in rows if "eval_loss" in r] == [3, 6]
    assert rows[-1]["time"] > rows[0]["time"] > 0
