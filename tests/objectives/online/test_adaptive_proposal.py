"""f-DPG's adaptive proposal: which of two laws is nearer to the target, exactly; the gradient under
another sampler; when the proposal moves, and that a resumed run goes on with it.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from online_world import online_job
from world import save_model

from alignkit import FDPG
from alignkit.files import read_jsonl
from alignkit.objectives.adaptive_proposal import empty_window, looked_at, proposal_gains
from alignkit.oracles.gradients import Population, gradient, regularised_value
from alignkit.training.loop import train


def test_the_gain_is_the_difference_of_two_kls_to_the_target():
    """Each outcome is in its group as often as the proposal draws it, so nothing is left to chance."""
    counts = torch.tensor([[4, 2, 1, 1], [1, 1, 1, 5]])
    noise = torch.Generator().manual_seed(0)
    policy, score = (torch.randn(2, 4, generator=noise, dtype=torch.float64) for _ in range(2))
    policy = policy.log_softmax(-1)
    proposal = (counts.double() / 8).log()
    unnormalised = torch.randn(2, 4, generator=noise, dtype=torch.float64) + 3 * score

    target = unnormalised.log_softmax(-1)
    apart = [(target.exp() * (target - law)).sum(-1) for law in (proposal, policy)]
    groups = torch.tensor([7, 2]).repeat_interleave(8)  # not in order, not from 0
    rows = torch.cat(
        [torch.arange(4).repeat_interleave(row) + 4 * i for i, row in enumerate(counts)]
    )
    gains = proposal_gains(
        *(law.flatten()[rows] for law in (unnormalised, proposal, policy)), groups
    )
    torch.testing.assert_close(gains.flip(0), apart[0] - apart[1], rtol=0, atol=1e-12)
    assert gains.sign().tolist() != [0, 0]


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_gradient_under_another_sampler_is_that_of_the_policy(scale):
    """The proposal drew, the policy has moved on: importance makes the reverse KL's gradient exact."""
    population, beta = Population.build(), 0.7
    scores = torch.linspace(-1, 1, len(population.tree.tokens), dtype=torch.float64)
    noise = torch.Generator().manual_seed(1)
    moved = population.theta + scale * torch.randn(
        population.theta.shape, generator=noise, dtype=torch.float64
    )
    objective = FDPG(beta=beta, divergence="reverse_kl", cap=100.0, proposal="adaptive")
    credited, _ = objective.credit(
        population.batch(objective, moved, scores), objective.init_state()
    )

    def delivered(theta):
        tokens = population.batch(objective, theta, scores).tokens
        (term,) = objective.loss(replace(credited, tokens=tokens)).terms
        return term.values.mean()

    wanted = gradient(
        lambda theta: (
            -regularised_value(population.tree, theta, scores, population.reference, beta) / beta
        ),
        moved,
    )
    torch.testing.assert_close(gradient(delivered, moved), wanted, rtol=0, atol=1e-10)


def test_a_look_at_the_end_of_each_window():
    state = empty_window()
    renewed = []
    for gain in (1.0, 3.0, -1.0, -1.0, 5.0, -1.0):
        state, renew = looked_at(state, torch.tensor([gain, gain]).double(), 8, window=16)
        renewed.append(renew)
    assert renewed == [False, True, False, False, False, True]
    assert state["proposal_renewals"] == 2
    assert state["proposal_gain"] == 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def fdpg_job(model, out, window, **settings):
    objective = FDPG(beta=0.1, proposal="adaptive", window=window)
    return online_job(model, out, objective, learning_rate=3e-3, **settings)


def run(job, resume=None):
    with job.run:
        train(job, resume)
    return read_jsonl(job.run.metrics_file)


def proposal_of(job):
    return {
        name: value
        for name, value in job.pair.state().items()
        if name.startswith("anchor.proposal.")
    }


def test_a_proposal_that_is_never_looked_at_samples_as_the_first_policy_did(model, tmp_path):
    job = fdpg_job(model, tmp_path / "run", 10**6, steps=3)
    start = proposal_of(job)
    rows = run(job)
    assert all(torch.equal(value, start[name]) for name, value in proposal_of(job).items())
    # What the policy's log-probs differ by is no fault of the sampler's.
    assert not any("sampling/logp_difference_max" in row for row in rows)
    assert rows[0]["kl/behavior_policy_k3"] < 1e-9
    assert rows[2]["kl/behavior_policy_k3"] > 1e-4
    assert rows[2]["credit/proposal_renewals"] == 0


def test_it_becomes_the_policy_and_a_resumed_run_goes_on_with_it(model, tmp_path):
    job = fdpg_job(model, tmp_path / "whole", 32, steps=6, save_every=3)
    weights = []
    step = job.pair.after_step
    job.pair.after_step = lambda n: (step(n), weights.append(job.pair.state()))[0]
    rows = run(job)
    renewals = [0, *(row["credit/proposal_renewals"] for row in rows)]
    moved = [n for n, (old, new) in enumerate(pairwise(renewals)) if new > old]
    assert moved
    assert all(n % 2 == 1 for n in moved), "a window is two steps of 16 completions"
    for n in moved:  # it is the policy that the step began with
        policy = weights[n - 1]
        for name, value in weights[n].items():
            if name.startswith("anchor.proposal."):
                assert torch.equal(value, policy[name.replace("anchor.proposal.", "model.")])

    part = fdpg_job(model, tmp_path / "part", 32, steps=6, save_every=3)
    part.run.path.mkdir()
    for name in ("checkpoints/step-3", "metrics.jsonl"):
        target = part.run.path / name
        target.parent.mkdir(exist_ok=True)
        (tmp_path / "whole" / name).rename(target)
    run(part, "auto")
    expected = job.pair.state()
    assert all(torch.equal(value, expected[name]) for name, value in part.pair.state().items())
