"""Rollouts that are sampled while earlier ones are trained on: which weights draw them, that old
weights leave no bias, that runs resume, and that the two overlap.
"""

import statistics
import time
from itertools import product

import pytest
import torch
from accelerate import Accelerator
from online_world import online_job
from world import run, save_model

from alignkit.batches import Bundle, Draw, LossTerms, Term, TokenLogps
from alignkit.files import read_jsonl
from alignkit.objectives.online.rloo import RLOO
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.importance import Correction, weighted
from alignkit.rollout.protocol import Sample
from alignkit.sources.ahead import Ahead, Request
from alignkit.training import loop


def train(job, resume=None):
    with job.run:
        return loop.train(job, resume)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def recorded(job):
    """The policy's weights at the start of every rollout, and what each rollout trains on."""
    source, collect = job.source, job.source.collect
    weights, drawn = [], []

    def recording(step, half=0):
        weights.append({name: p.detach().clone() for name, p in job.pair.base.named_parameters()})
        bundles = collect(step, half)
        drawn.append([[ids.tolist() for ids in bundle.completions] for bundle in bundles])
        return bundles

    source.collect = recording
    return weights, drawn


@torch.no_grad()
def test_each_rollout_is_drawn_with_the_weights_of_k_rollouts_before(model, tmp_path):
    job = online_job(model, tmp_path / "run", RLOO(), ahead=2, steps=5, learning_rate=0.05)
    weights, drawn = recorded(job)
    with torch.enable_grad():
        train(job)
    lags = [row["rollout/lag"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert lags == [0, 1, 2, 2, 2]

    sampler = HFSampler(job.pair, max_new_tokens=6, seed=0)
    for number, lag in enumerate(lags):
        for name, parameter in job.pair.base.named_parameters():
            parameter.copy_(weights[number - int(lag)][name])
        (request,) = job.source._requests_of(number)
        samples = sampler.sample(
            request.prompts, request.draw, step=request.clock, prompt_ids=request.positions
        )
        assert [[s.ids.tolist() for s in row] for row in samples] == drawn[number]


def test_a_run_that_is_taken_up_again_is_the_whole_run(model, tmp_path):
    def job(name, steps):
        settings = {"save_every": 3, "learning_rate": 0.05, "schedule": "constant"}
        return online_job(model, tmp_path / name, RLOO(), ahead=2, steps=steps, **settings)

    whole = job("whole", 6)
    train(whole)
    first = job("part", 6)
    collect = first.source.collect

    def dying(step, half=0):
        if step == 4:
            raise KeyboardInterrupt
        return collect(step, half)

    first.source.collect = dying
    with pytest.raises(KeyboardInterrupt):
        train(first)
    resumed = job("part", 6)
    train(resumed, "auto")
    assert resumed.run.last_step() == 6
    expected = whole.pair.state()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.pair.state().items())


def test_the_expected_gradient_of_old_samples_is_the_on_policys():
    """Enumerated: two completions of two tokens out of three each, with leave-one-out baselines,
    drawn from the policy before its last update. The exact weights undo the lag.
    """
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    old_table = table.detach() + 0.5 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
    rewards = torch.randn(9, generator=generator, dtype=torch.float64)
    completions = torch.tensor(list(product(range(3), repeat=2)))

    def token_logps(logits):
        laws = logits.log_softmax(-1)
        return torch.stack([laws[0, completions[:, 0]], laws[1, completions[:, 1]]], 1)  # [9, 2]

    pairs = torch.tensor(list(product(range(9), repeat=2)))  # [81, 2]
    advantages = (rewards[pairs] - rewards[pairs.flip(1)]).flatten()  # leave one out, [162]
    new, old = token_logps(table), token_logps(old_table)
    rows = pairs.flatten()

    def gradient(law, bundles):
        """Of the loss's expectation when both completions are drawn from `law` [9]."""
        values = -advantages * new.sum(-1)[rows]
        (term,) = weighted(LossTerms([Term("reinforce", values)]), bundles).terms
        chance = law[pairs].prod(1).repeat_interleave(2)
        return torch.autograd.grad((chance * term.values).sum(), table, retain_graph=True)[0]

    mask = torch.ones(162, 2, dtype=torch.bool)
    tokens = TokenLogps(new.detach()[rows], {}, mask, old[rows])
    one = torch.ones(1, dtype=torch.bool)
    bundle = Bundle(torch.tensor([1]), [torch.tensor([2])] * 2, [one] * 2)
    weighed, _ = Correction(cap=1e6).weigh([bundle] * 81, tokens, Accelerator(cpu=True))

    on_policy = gradient(new.detach().sum(-1).exp(), [bundle] * 81)
    lagged = gradient(old.sum(-1).exp(), weighed)
    assert torch.allclose(lagged, on_policy, atol=1e-12)
    assert not torch.allclose(gradient(old.sum(-1).exp(), [bundle] * 81), on_policy, atol=1e-2)


class Sleeping:
    """A sampler that waits and computes nothing."""

    def take(self):
        return None

    def use(self, weights):
        pass

    def sample(self, prompts, draw, *, step, prompt_ids):
        time.sleep(0.5)
        return [[Sample(torch.tensor([2]), torch.zeros(1), True)]]


@pytest.mark.parametrize("training", [0.25, 0.6])
def test_sampling_and_training_overlap(training):
    requests = [Request([torch.tensor([1])], Draw(1), 0, [0])]
    drawing = Ahead(Sleeping(), 1, lambda number: requests)
    drawing.take(0)
    began = time.monotonic()
    for number in range(1, 4):
        time.sleep(training)
        drawing.take(number)
    per_step = (time.monotonic() - began) / 3
    assert per_step < 1.1 * max(0.5, training)


@pytest.mark.parametrize(
    ("objective", "settings", "words"),
    [
        ("egpo", [], "extragradient steps sample twice"),
        ("nash_md", [], "draws from other models than the policy"),
        ("rloo", ["rollout.pass_rate=[0.1, 0.9]"], "leave out one of ahead and pass_rate"),
    ],
)
def test_what_cannot_be_sampled_ahead_is_refused(tmp_path, capsys, objective, settings, words):
    code = run("train", objective, "rollout.ahead=1", f"output_dir={tmp_path}/run", *settings)
    assert (code, words in " ".join(capsys.readouterr().err.split())) == (2, True)


@pytest.mark.long
def test_the_reward_curve_is_within_noise_of_the_on_policy_one(tmp_path, capsys):
    """`arithmetic`, three seeds: the difference of the last rewards, paired by seed. At the recipe's
    learning rate, ten times this one, the policy moves too far in a step for a lag of one.
    """
    steps, tail = 40, 20
    gaps, noise = [], []
    for seed in range(3):
        ends = []
        for ahead in (0, 1):
            out = tmp_path / f"{ahead}-{seed}"
            settings = [
                f"rollout.ahead={ahead}",
                f"train.seed={seed}",
                f"train.steps={steps}",
                f"output_dir={out}",
                "data.train=task:arithmetic",
                "train.batch_size=8",
                "train.learning_rate=2.0e-4",
                "train.eval_every=0",
                "train.save_every=0",
                "train.log_samples_every=0",
            ]
            assert run("train", "rloo", *settings) == 0
            rows = read_jsonl(out / "metrics.jsonl")
            ends.append([row["reward"] for row in rows[-tail:]])
        gaps.append(statistics.mean(ends[1]) - statistics.mean(ends[0]))
        noise += [statistics.variance(end) / tail for end in ends]
    gap = statistics.mean(gaps)
    error = sum(noise) ** 0.5 / 3
    with capsys.disabled():
        print(
            f"\nreward of ahead=1 - ahead=0, last {tail} of {steps} steps: {gap:+.3f} +- {error:.3f}"
        )
    assert abs(gap) < 3 * error
