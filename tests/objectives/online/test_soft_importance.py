"""SAPO, LUSPO and VESPO: numbers by hand, and what they are when policy and sampler agree. What is
logged of clips, and the entropy bonus of GRPO's relatives.
"""

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from alignkit import CISPO, GRPO, GSPO, LUSPO, RPG, SAPO, VESPO
from alignkit.batches import RolloutBatch, TokenLogps
from alignkit.losses import sapo_loss
from alignkit.objectives.exploration import BONUS
from alignkit.objectives.online.vespo import gamma_weights
from alignkit.objectives.rollout_base import clip_metrics

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


RATIOS = torch.tensor([[0.5, 0.5, 1.5, 1.5], [1.0, 1.5, 0.5, 9.0]], dtype=F64)
SIGNS = torch.tensor([[-1.0, 1.0, 1.0, -1.0], [1.0, 1.0, 0.0, 1.0]], dtype=F64)
KEPT = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()


@pytest.mark.parametrize(
    ("low", "high", "below", "above"),
    [
        (0.2, 0.2, [1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 1, 0]),
        (None, 0.2, [0] * 7, [0, 0, 1, 0, 0, 1, 0]),
        (0.6, 0.6, [0] * 7, [0] * 7),
    ],
)
def test_a_token_is_clipped_where_it_loses_its_gradient(low, high, below, above):
    """As TRL counts it: outside of the bounds on the side to which its advantage pushes."""
    tokens = TokenLogps(RATIOS.log(), {}, KEPT, torch.zeros_like(RATIOS))
    found = clip_metrics(tokens, RATIOS, SIGNS, low, high)
    assert found["clip_ratio/low_mean"].tolist() == below
    assert found["clip_ratio/high_mean"].tolist() == above
    either = [a + b for a, b in zip(below, above)]
    assert found["clip_ratio/region_mean"].tolist() == either
    assert clip_metrics(tokens, RATIOS, SIGNS, None, None) == {}


@pytest.mark.parametrize("anchor", ["behavior", "reference"])
def test_rpg_counts_the_tokens_whose_gradient_it_stops(anchor):
    """With the KL to the sampler inside the weight, not by the advantage alone."""
    generator = torch.Generator().manual_seed(3)
    objective = RPG(
        anchor=anchor, kl_credit="token", beta=0.5, clip_low=0.1, clip_high=0.1, dual_clip=None
    )
    rollout = batch(drift=0.6)
    advantages = torch.randn(3, 3, generator=generator, dtype=F64) * rollout.tokens.mask
    extras = {"kl": torch.zeros(3, 3, dtype=F64)}
    tokens = replace(rollout.tokens, extras=extras, anchors={"reference": rollout.tokens.behavior})
    out = objective.loss(replace(rollout, tokens=tokens, advantages=advantages))
    (gradient,) = torch.autograd.grad(out.terms[0].values.sum(), tokens.policy)
    stopped = (gradient == 0)[tokens.mask]
    assert 0 < stopped.sum() < len(stopped)
    assert out.metrics["clip_ratio/region_mean"].bool().tolist() == stopped.tolist()


@pytest.mark.parametrize("cls", [GSPO, LUSPO, SAPO, CISPO, VESPO])
def test_relatives_of_grpo_take_its_entropy_bonus_and_its_mask(cls):
    """The second completion has a negative advantage, and each of its tokens lost 0.1 nats."""
    unclipped = {"clip_low": None, "clip_high": None}
    rollout = batch(drift=0.0)
    entropy = torch.rand(3, 3, dtype=F64)
    policy = rollout.tokens.policy
    drifted = policy.detach() + 0.1 * rollout.tokens.mask
    tokens = replace(rollout.tokens, behavior=drifted, extras={BONUS: entropy})
    for threshold, teaches in ((0.09, False), (0.11, True), (None, True)):
        objective = cls(entropy_weight=0.5, off_policy_threshold=threshold, **unclipped)
        term, bonus = objective.loss(replace(rollout, tokens=tokens)).terms
        assert (bonus.name, bonus.weight, bonus.unit) == ("entropy", 0.5, "tokens")
        torch.testing.assert_close(bonus.values, -entropy)

        (gradient,) = torch.autograd.grad(term.values.sum(), policy)
        assert (gradient[1, :2] != 0).tolist() == [teaches, teaches]
        assert (gradient[0, 0] != 0) & (gradient[2] != 0).all()
