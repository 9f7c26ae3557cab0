"""Streams: the gradient of a step is the sum of their weighted losses, each over its own counts."""

import math
import shutil
from dataclasses import fields

import pytest
import torch
from online_world import streams_job
from world import save_model

from alignkit.errors import ConfigError
from alignkit.files import read_jsonl
from alignkit.objectives.online.kl_ppo import KLPPO
from alignkit.objectives.online.rpg import RPG
from alignkit.objectives.preference.aot import AOT
from alignkit.objectives.preference.dpo import DPO
from alignkit.objectives.preference.sft import SFT
from alignkit.objectives.reward.reward_model import PlackettLuce
from alignkit.objectives.self_play.egpo import EGPO
from alignkit.objectives.streams import NEEDS, Reweigh, Stream, Streams
from alignkit.plan import Plan
from alignkit.training.loop import train
from alignkit.training.streams import reducer_of

PAIRS, ONLINE, COUPLED, TUNED = DPO(beta=0.5), RPG(beta=0.1), AOT(beta=0.5), SFT()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def gradient(job):
    """The whole gradient of the first step, in float64, and its metrics."""
    job.pair.base.double()
    for anchor in job.pair.anchors.values():
        if anchor.module is not None:
            anchor.module.double()
    metrics = reducer_of(job).backward(job.source.collect(0, 0))
    parts = [
        torch.zeros(p.numel()).double() if p.grad is None else p.grad.flatten()
        for p in job.pair.parameters()
    ]
    return torch.cat(parts), metrics


@pytest.mark.parametrize(
    "objectives",
    [(PAIRS, TUNED), (ONLINE, TUNED), (COUPLED, PAIRS), (TUNED, ONLINE, PAIRS)],
    ids=["fixed", "sampled", "coupled", "three"],
)
@pytest.mark.parametrize("budget", [4096, 24])
def test_the_gradient_is_the_weighted_sum_of_those_of_separate_runs(
    model, tmp_path, objectives, budget
):
    # Powers of two: the model's norms round in float32, which other factors would change.
    weights = [0.5, 0.25, 0.125][: len(objectives)]
    parts = [(f"s{i}", o, w) for i, (o, w) in enumerate(zip(objectives, weights))]
    options = {"budget": budget, "max_grad_norm": 0.0}
    together, metrics = gradient(streams_job(model, tmp_path, parts, **options))

    expected, loss = 0.0, 0.0
    for number, (name, objective, weight) in enumerate(parts):
        job = streams_job(model, tmp_path, parts, **options)
        alone = job.source.sources[number]
        job.objective, job.source = objective, alone
        own, own_metrics = gradient(job)
        expected = expected + weight * own
        loss += weight * own_metrics["loss"]
        assert metrics[f"{name}/loss"] == pytest.approx(own_metrics["loss"], abs=1e-12)
        assert metrics[f"{name}/weight"] == weight
    assert together.abs().max() > 1e-3
    torch.testing.assert_close(together, expected, atol=1e-10, rtol=0)
    assert metrics["loss"] == pytest.approx(loss, abs=1e-12)


def test_a_run_that_is_resumed_is_the_run_that_was_not(model, tmp_path):
    """Inside a rollout, and inside the windows of the weights."""
    critic = KLPPO(beta=0.1, epochs=2, kl_target=0.5)
    parts = [("online", critic, 0.6), ("tuned", TUNED, 0.4)]

    def run(out, resume=None):
        job = streams_job(
            model, out, parts, reweigh=Reweigh(window=2), steps=9, save_every=1, keep=99
        )
        with job.run:
            train(job, resume)
        return job.pair.state(), read_jsonl(out / "metrics.jsonl")

    weights, rows = run(tmp_path / "whole")
    factors = [[row["online/weight"] / 0.6, row["tuned/weight"] / 0.4] for row in rows]
    assert factors[:4] == [[1.0, 1.0]] * 4  # two windows of two steps have to be there
    assert all(abs(a - 1) > 1e-6 and math.isclose(a + b, 2) for a, b in factors[4:])
    assert all("online/reward" in row and "tuned/epoch" in row for row in rows)

    whole, part = tmp_path / "whole", tmp_path / "part"
    shutil.copytree(whole / "checkpoints" / "step-5", part / "checkpoints" / "step-5")
    shutil.copy(whole / "metrics.jsonl", part / "metrics.jsonl")
    again, rows_again = run(part, "auto")
    assert [row["loss"] for row in rows] == [row["loss"] for row in rows_again]
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_streams_that_cannot_share_a_model_are_refused():
    def plan(*objectives):
        return Streams(streams=[Stream(f"s{i}", o, 0.5) for i, o in enumerate(objectives)]).plan

    with pytest.raises(ConfigError, match="stream `s1` trains a model of rewards"):
        plan(TUNED, PlackettLuce())
    with pytest.raises(ConfigError, match="disagree on `update`"):
        plan(TUNED, EGPO())
    together = plan(TUNED, KLPPO())
    assert together.values
    assert together.data == "rollout"
    assert together.anchors == ("reference",)
    assert NEEDS.keys() == {field.name for field in fields(Plan)}, "a new field needs a rule"


def observed(reweigh, *signals):
    """Factors after streams have shown these signals, one after the other."""
    state = reweigh.init_state(len(signals))
    for step in zip(*signals, strict=True):
        state = reweigh.observe(state, step)
    return reweigh.factors(state)


def test_equal_signals_and_a_high_temperature_are_the_plain_sum():
    reweigh = Reweigh(window=2)
    falling, jumping = [4.0, 3.0, 2.0, 2.5], [1.0, 9.0, 2.0, 7.0]
    assert observed(reweigh, falling, falling, falling).tolist() == [1.0, 1.0, 1.0]
    hot = observed(Reweigh(window=2, temperature=1e12), falling, jumping)
    assert hot.tolist() == pytest.approx([1.0, 1.0], abs=1e-11)
    assert observed(reweigh, falling[:3], jumping[:3]).tolist() == [1.0, 1.0]  # not yet known


def test_the_scale_of_a_stream_changes_nothing():
    reweigh = Reweigh(window=2)
    first, second = [4.0, 3.0, 2.0, 2.5], [0.3, 0.1, -0.2, 0.1]
    factors = observed(reweigh, first, second)
    assert abs(factors[0] - 1) > 0.1
    for scale in (1e-6, 8.0, 1e9):
        scaled = observed(reweigh, [scale * value for value in first], second)
        torch.testing.assert_close(scaled, factors, atol=1e-12, rtol=1e-12)
        scaled = observed(reweigh, first, [scale * value for value in second])
        torch.testing.assert_close(scaled, factors, atol=1e-12, rtol=1e-12)


def test_worked_factors():
    """Means 1 and 2 of the windows, 2 and 2; deviations 1 and 0."""
    factors = observed(Reweigh(window=2), [1.0, 1.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0])
    score = [2 / 1 + 1 / 2, 1.0]
    whole = sum(math.exp(s) for s in score)
    assert factors.tolist() == pytest.approx([2 * math.exp(s) / whole for s in score], abs=1e-12)
    assert observed(Reweigh(window=2), [0.0] * 4, [0.0] * 4).tolist() == [1.0, 1.0]
