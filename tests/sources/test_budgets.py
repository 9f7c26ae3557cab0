"""Sample budgets: worked shares, the least variance, and what they leave as it is."""

import json
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from accelerate import Accelerator
from online_world import budgeted_job, online_job
from world import save_model

from alignkit.batches import Bundle
from alignkit.config.allocation import AllocateConfig
from alignkit.config.rollout import RolloutConfig
from alignkit.errors import ConfigError
from alignkit.files import read_jsonl
from alignkit.objectives.online.kl_ppo import KLPPO
from alignkit.objectives.online.raft import RAFT
from alignkit.policies.gradient_norms import head_gradient_norms
from alignkit.rollout.protocol import Sample
from alignkit.sources.budgets import Allocation, alike, sample_budgets
from alignkit.training.loop import train


def test_worked_shares():
    """p = 0.25, 0.5, 1 and G = 1, 2, 1: shares 0.3417, 0.4861, 0.1721."""
    counts = sample_budgets([0.25, 0.5, 1.0], 10**6, norms=[1.0, 2.0, 1.0])
    shares = [count / 10**6 for count in counts]
    assert shares == pytest.approx([0.3417, 0.4861, 0.1721], abs=5e-5)
    assert sum(counts) == 10**6


def test_at_alpha_zero_the_variance_is_least():
    rates, norms, total = [0.25, 0.5, 1.0, 0.1], [1.0, 2.0, 1.0, 0.5], 24

    def variance(counts):
        return sum(g**2 / (p * n) for g, p, n in zip(norms, rates, counts))

    best = min(
        variance(counts) for counts in product(range(1, total), repeat=4) if sum(counts) == total
    )
    counts = sample_budgets(rates, total, alpha=0.0, norms=norms)
    assert sum(counts) == total
    assert variance(counts) <= 1.005 * best  # whole numbers by the residual, not by search

    # Without rounding it is the minimum of the spec.
    many = [n / 10**6 * total for n in sample_budgets(rates, 10**6, alpha=0.0, norms=norms)]
    minimum = sum(g / math.sqrt(p) for g, p in zip(norms, rates)) ** 2 / total
    assert variance(many) == pytest.approx(minimum, rel=1e-5)
    assert minimum <= best


def head_gradient(pair, prompt, ids):
    """By autograd: the norm of the gradient of a completion's log-prob in the head's weight."""
    model = pair.base.model
    row = torch.cat([prompt, ids])
    logits = model(row[None]).logits[0, len(prompt) - 1 : -1] / pair.base.temperature
    logps = logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).sum()
    (by_weight,) = torch.autograd.grad(logps, model.lm_head.weight)
    return float(by_weight.norm())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_norms_in_the_head_are_autograds(model, tmp_path, temperature):
    job = online_job(model, tmp_path, RAFT(threshold=0.5))
    job.pair.base.double().temperature = temperature
    bundles = [
        Bundle(torch.tensor([1, 5]), [torch.tensor(ids) for ids in rows], masks(rows))
        for rows in ([[3, 4, 5], [3, 4, 9, 2]], [[7]], [[8, 8], [2], [11, 12, 2]])
    ]
    expected = [
        [head_gradient(job.pair, bundle.prompt, ids) for ids in bundle.completions]
        for bundle in bundles
    ]
    for budget in (4096, 8):
        found = head_gradient_norms(job.pair, bundles, budget)
        assert [len(row) for row in found] == [2, 1, 3]
        for row, other in zip(found, expected):
            assert row == pytest.approx(other, abs=1e-10, rel=0)


def masks(rows):
    return [torch.ones(len(ids), dtype=torch.bool) for ids in rows]


def test_prompts_with_large_gradients_get_more(model, tmp_path):
    """Pilots that pass alike, of which those of one prompt have ten times the gradient."""
    asked = []

    def norms(bundles):
        asked.extend(bundles)
        return [[10.0 if b.uid == "0" else 1.0] * len(b.completions) for b in bundles]

    config = AllocateConfig(pilot=2, threshold=0.5, alpha=0.0, norm="head")
    rows = [
        [replace(bundle(2), uid=str(n), rows={"score": torch.tensor(scores)})]
        for n, scores in enumerate([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    ]
    allocation = Allocation(config, mean=8, room=6, norms=norms)
    counts, _ = allocation._counts([5, 6, 7], rows, Accelerator(cpu=True))
    assert counts == {5: 20, 6: 2, 7: 2}  # 22 : 2.2, the pilot at least
    assert [len(b.completions) for b in asked] == [1, 1]  # accepted ones alone
    alike_counts, _ = replace(allocation, norms=None)._counts(
        [5, 6, 7], rows, Accelerator(cpu=True)
    )
    assert alike_counts == {5: 11, 6: 11, 7: 2}
    with pytest.raises(ConfigError, match="finite and not negative"):
        sample_budgets([0.5], 7, norms=[math.nan])


def test_prompts_that_never_pass_get_the_pilot_alone():
    assert sample_budgets([0.0, 0.5, 0.5], 24, least=4) == [4, 10, 10]
    assert sample_budgets([0.0, 0.0], 16, least=4) == [8, 8]  # nothing speaks for either
    assert sample_budgets([0.5, 1.0], 12, norms=[0.0, 1.0]) == [0, 12]


def test_nobody_gets_less_than_the_pilot_and_the_total_stays():
    counts = sample_budgets([0.01, 1.0, 1.0, 1.0], 24, least=4)
    assert counts[1:] == [4, 4, 4]
    assert sum(counts) == 24


def test_what_cannot_be_shared_out_is_refused():
    with pytest.raises(ConfigError, match="less than 4"):
        sample_budgets([0.5, 0.5], 7, least=4)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        sample_budgets([1.5], 7)
    with pytest.raises(ValueError, match="nothing of completions"):
        RolloutConfig(completions=4, allocate={"pilot": 4})
    with pytest.raises(ValueError, match="pass_rate"):
        RolloutConfig(allocate={}, pass_rate=(0.1, 0.9))


def bundle(count):
    ids = [torch.tensor([3])] * count
    return Bundle(torch.tensor([1]), ids, [torch.ones(1, dtype=torch.bool)] * count)


class Alone:
    """An accelerator of one process."""

    use_distributed = False
    num_processes = 1


def test_every_prompt_counts_alike_however_many_completions_it_has():
    weighed = alike({0: [bundle(2)], 3: [bundle(6)]}, Alone())
    sums = [float(row[0].rows["importance"].sum()) for row in weighed.values()]
    assert sums == pytest.approx([4, 4])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def passes(prompts, completions, **columns):
    """Prompt n passes where the first token is at most n: some always, some never."""
    return [float(ids[0] <= n) for ids, n in zip(columns["completion_ids"], columns["n"])]


def budgeted(model, out):
    job = online_job(model, out, RAFT(threshold=0.5), reward=passes, steps=2, n_prompts=8)
    job.source.allocation = Allocation(AllocateConfig(pilot=2, threshold=0.5), mean=4, room=6)
    return job


def test_a_run_gives_its_samples_away_and_draws_what_one_draw_would(model, tmp_path):
    job = budgeted(model, tmp_path)
    bundles = job.source.collect(0)
    sizes = [len(b.completions) for b in bundles]
    assert sum(sizes) == 4 * len(sizes)
    assert len(set(sizes)) > 1
    mean_weight = [float(b.rows["importance"].sum()) for b in bundles]
    assert mean_weight == pytest.approx([4.0] * len(sizes))

    # Noise belongs to the number of a completion: the first of a large draw are those of a small.
    plain = online_job(model, tmp_path / "plain", RAFT(threshold=0.5), reward=passes, n_prompts=8)
    plain.source.completions = max(sizes)
    for ours, whole in zip(bundles, plain.source.collect(0)):
        assert ours.uid == whole.uid
        for one, other in zip(ours.completions, whole.completions):
            assert torch.equal(one, other)

    with job.run:
        train(job, None)
    rows = read_jsonl(job.run.metrics_file)
    assert all(row["rollout/most_completions"] > 4 for row in rows)
    assert all(0 <= row["rollout/never_passed"] < 1 for row in rows)


def test_a_resume_in_the_middle_of_a_rollout_is_bit_equal(model, tmp_path):
    """With rewards of single tokens, which stand in the checkpoint beside the weights of prompts."""
    objective = KLPPO(beta=0.1, epochs=2, minibatches=2, kl_target=0.5, kl_horizon=20)

    def finished(out, resume=None):
        job = budgeted_job(model, out, objective, steps=6, save_every=1, keep=99)
        with job.run:
            train(job, resume)
        return job.pair.state(), read_jsonl(job.run.metrics_file)

    expected, rows = finished(tmp_path / "whole")
    assert any(row["rollout/most_completions"] > 4 for row in rows)
    for step in (3, 4):  # inside a rollout, and at its end
        out = tmp_path / f"from-{step}"
        (out / "checkpoints").mkdir(parents=True)
        checkpoint = f"checkpoints/step-{step}"
        (tmp_path / "whole" / checkpoint).rename(out / checkpoint)
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        weights, again = finished(out, "auto")
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
        assert [row["loss"] for row in again] == [row["loss"] for row in rows]


def test_a_completion_without_a_score_leaves_the_others(model):
    samples = [[Sample(torch.tensor([4]), torch.zeros(1), True)]]
    allocation = Allocation(AllocateConfig(pilot=1), mean=2, room=6)

    class Engine:
        def sample(self, prompts, draw, **_):
            return [[Sample(torch.tensor([5]), torch.zeros(1), True)] for _ in prompts]

    from alignkit.batches import Draw
    from alignkit.sources.ahead import Request

    request = Request([torch.tensor([1])], Draw(1), 0, [7])
    answers, bundles, _ = allocation.completed(
        request, samples, [[bundle(1)]], Engine(), lambda positions, rest: [None], Alone()
    )
    assert [len(row) for row in answers] == [2]
    assert [len(b.completions) for b in bundles[0]] == [1]
