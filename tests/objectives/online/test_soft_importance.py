"""SAPO, LUSPO and VESPO: numbers by hand, and what they are when policy and sampler agree."""

import math

import pytest
import torch
from pydantic import ValidationError

from alignkit import GRPO, GSPO, LUSPO, SAPO, VESPO
from alignkit.batches import RolloutBatch, TokenLogps
from alignkit.losses import sapo_loss
from alignkit.objectives.online.vespo import gamma_weights

F64 = torch.float64


def gate(ratio, temperature):
    return 4 / temperature / (1 + math.exp(-temperature * (ratio - 1)))


def test_sapo_gates_each_token_by_the_sign_of_its_advantage():
    ratios = torch.tensor([0.5, 1.0, 3.0, 3.0], dtype=F64)
    advantages = torch.tensor([1.0, 2.0, 2.0, -2.0], dtype=F64)
    logps = ratios.log().requires_grad_()
    loss = sapo_loss(logps, torch.zeros(4, dtype=F64), advantages, temperature_negative=1.5)
    expected = [-gate(0.5, 1.0), -2 * gate(1.0, 1.0), -2 * gate(3.0, 1.0), 2 * gate(3.0, 1.5)]
    assert loss.tolist() == pytest.approx(expected)

    # At ratio 1 the gradient is the policy gradient; farther away it is smaller than -w A.
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    assert slope[1].item() == pytest.approx(-2.0)
    assert (slope.abs() < (ratios * advantages).abs())[[0, 2, 3]].all()


def test_vespo_weights_whole_completions():
    ratios = torch.tensor([1.0, 0.5, 2.0], dtype=F64)
    power, decay = torch.tensor([2.0, 2.0, 3.0]), torch.tensor([3.0, 3.0, 2.0])
    weights = gamma_weights(ratios.log(), power.double(), decay.double())
    expected = [1.0, 0.5**2 * math.exp(3 * 0.5), 2.0**3 * math.exp(-2.0)]
    assert weights.tolist() == pytest.approx(expected)
    assert gamma_weights(torch.tensor([-1e4, 1e4]), power[:2], decay[:2]).isfinite().all()


def batch(drift):
    """Three completions of 1 to 3 tokens with their advantages."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool()
    policy = -torch.rand(3, 3, generator=generator, dtype=F64) * mask
    behavior = policy + drift * torch.randn(3, 3, generator=generator, dtype=F64) * mask
    advantages = torch.tensor([1.0, -0.5, 2.0], dtype=F64)
    tokens = TokenLogps(policy.requires_grad_(), {}, mask, behavior.detach())
    return RolloutBatch(
        tokens, advantages, torch.zeros(3, dtype=torch.long), advantages[:, None] * mask
    )


def slope(objective, rollout):
    (term,) = objective.loss(rollout).terms
    return torch.autograd.grad(term.values.sum(), rollout.tokens.policy)[0]


def test_luspo_is_gspo_times_the_length():
    rollout = batch(drift=0.3)
    clip = {"clip_low": 0.1, "clip_high": 0.2}
    found = LUSPO(**clip).loss(rollout).terms[0].values
    expected = GSPO(**clip).loss(rollout).terms[0].values * torch.tensor([1, 2, 3])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("objective", "aggregation"),
    [(SAPO(), "sequence_mean"), (LUSPO(), "sequence_sum"), (VESPO(), "token_mean")],
)
def test_the_first_step_is_grpos(objective, aggregation):
    rollout = batch(drift=0.0)
    expected = slope(GRPO(beta=0, aggregation=aggregation), rollout)
    torch.testing.assert_close(slope(objective, rollout), expected)


@pytest.mark.parametrize("cls", [SAPO, VESPO])
def test_a_clip_that_would_do_nothing_is_refused(cls):
    with pytest.raises(ValidationError, match="clip_low"):
        cls(clip_low=0.2)
