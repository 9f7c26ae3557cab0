"""The pure losses of the online objectives: hand-written values, clips, extremes."""

import math

import pytest
import torch

from alignkit.errors import ConfigError, ShapeError
from alignkit.losses import grpo_loss, ppo_loss, rloo_loss, rpg_loss, value_loss

F64 = torch.float64
LOG2, LOG_HALF = math.log(2.0), -math.log(2.0)


def at_ratio(ratios, advantages, **options):
    """ppo_loss and its gradient at the given importance ratios."""
    policy = torch.tensor(ratios, dtype=F64).log().requires_grad_()
    loss = ppo_loss(
        policy, torch.zeros_like(policy), torch.tensor(advantages, dtype=F64), **options
    )
    (grad,) = torch.autograd.grad(loss.sum(), policy)
    return loss.tolist(), grad.tolist()


def test_ppo_clips_only_what_gains():
    loss, grad = at_ratio(
        [0.5, 1.0, 1.5, 0.5, 1.0, 1.5],
        [2.0, 2.0, 2.0, -2.0, -2.0, -2.0],
        clip_low=0.2,
        clip_high=0.3,
    )
    assert loss == pytest.approx([-1.0, -2.0, -2.6, 1.6, 2.0, 3.0], abs=1e-12)
    assert grad == pytest.approx([-1.0, -2.0, 0.0, 0.0, 2.0, 3.0], abs=1e-12)


def test_dual_clip_bounds_the_ratio_where_the_advantage_is_negative():
    loss, grad = at_ratio([2.9, 3.1, 3.1], [-1.0, -1.0, 1.0], dual_clip=3.0)
    assert loss == pytest.approx([2.9, 3.0, -3.1], abs=1e-12)
    assert grad == pytest.approx([2.9, 0.0, -3.1], abs=1e-12)


def test_without_bounds_ppo_is_the_weighted_advantage():
    loss, grad = at_ratio([0.1, 7.0], [1.5, -2.0])
    assert loss == pytest.approx([-0.15, 14.0], abs=1e-12)
    assert grad == pytest.approx([-0.15, 14.0], abs=1e-12)
    assert at_ratio([0.1, 7.0], [1.5, -2.0], clip_low=0.2)[0] == pytest.approx(
        [-0.15, 14.0], abs=1e-12
    )


def test_value_loss_is_pessimistic_about_the_clip():
    values = torch.tensor([1.0, 0.3, -1.0], dtype=F64, requires_grad=True)
    old, returns = torch.zeros(3, dtype=F64), torch.tensor([2.0, 2.0, 2.0], dtype=F64)
    assert value_loss(values, old, returns).tolist() == pytest.approx([0.5, 1.445, 4.5], abs=1e-12)
    clipped = value_loss(values, old, returns, clip=0.2)
    assert clipped.tolist() == pytest.approx([1.62, 1.62, 4.5], abs=1e-12)
    (grad,) = torch.autograd.grad(clipped.sum(), values)
    assert grad.tolist() == [0.0, 0.0, -3.0]


# at w = 2, A = 3, beta = 0.5, log pi = log 2: (value of the differentiable loss, its gradient,
# REINFORCE's)
RPG_TABLE = {
    "forward_kl": (-6 - 0.5 * LOG2, -6.5, -6.5),
    "reverse_kl": (-6 + LOG2, -6 + LOG2 + 1, -(6 - LOG2 - 1)),
    "forward_ukl": (-6 + 0.5 * (1 - LOG2), -6 + 0.5, -5.5),
    "reverse_ukl": (-6 + LOG2 - 1, -6 + LOG2, -(6 - LOG2)),
}


@pytest.mark.parametrize("divergence", RPG_TABLE)
def test_rpg_values_and_gradients_by_hand(divergence):
    value, slope, weight = RPG_TABLE[divergence]
    policy = torch.tensor([LOG2], dtype=F64, requires_grad=True)
    zero, advantage = torch.zeros(1, dtype=F64), torch.tensor([3.0], dtype=F64)
    form = {"beta": 0.5, "divergence": divergence}
    loss = rpg_loss(policy, zero, advantage, estimator="differentiable", **form)
    assert loss.item() == pytest.approx(value, abs=1e-12)
    assert torch.autograd.grad(loss.sum(), policy)[0].item() == pytest.approx(slope, abs=1e-12)
    reinforce = rpg_loss(policy, zero, advantage, estimator="reinforce", **form)
    assert reinforce.item() == pytest.approx(weight * LOG2, abs=1e-12)
    assert torch.autograd.grad(reinforce.sum(), policy)[0].item() == pytest.approx(
        weight, abs=1e-12
    )


def test_rpg_clip_keeps_and_cuts_by_the_sign_of_the_regularised_advantage():
    clip = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
    policy = (
        torch.tensor([1.2, 1.3, 0.1, 0.7, 0.9, 2.9, 3.1, 1.3], dtype=F64).log().requires_grad_()
    )
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0, 0.1], dtype=F64)
    loss = rpg_loss(policy, torch.zeros_like(policy), advantages, beta=0.5, **clip)
    (grad,) = torch.autograd.grad(loss.sum(), policy)
    # the last: A = 0.1 is positive, A - 0.5 log 1.3 is not, so the KL pulls back where the reward
    # alone would be cut
    assert (grad != 0).tolist() == [True, False, True, False, True, True, False, True]
    assert grad[-1].item() == pytest.approx(-1.3 * (0.1 - 0.5 * math.log(1.3)), abs=1e-12)


def test_grpo_is_the_clipped_surrogate_plus_the_penalty():
    policy = torch.tensor([[LOG2, LOG_HALF]], dtype=F64, requires_grad=True)
    zero, advantages = torch.zeros(1, 2, dtype=F64), torch.tensor([[1.0, 1.0]], dtype=F64)
    loss = grpo_loss(policy, zero, zero, advantages, beta=0.1, kl="k3", clip_low=0.2, clip_high=0.2)
    k3 = [0.5 - 1 + LOG2, 2 - 1 - LOG2]
    assert loss.flatten().tolist() == pytest.approx(
        [-1.2 + 0.1 * k3[0], -0.5 + 0.1 * k3[1]], abs=1e-12
    )
    weighted = grpo_loss(policy, zero, zero, advantages, beta=0.1, clip_low=0.2, clip_high=0.2)
    assert weighted.flatten().tolist() == pytest.approx(
        [-1.2 + 0.2 * k3[0], -0.5 + 0.05 * k3[1]], abs=1e-12
    )


def test_rloo_clips_the_ratio_of_the_whole_completion():
    loss = rloo_loss(
        torch.tensor([LOG2]), torch.tensor([0.0]), torch.tensor([3.0]), clip_low=0.2, clip_high=0.2
    )
    assert loss.item() == pytest.approx(-3.6, abs=1e-6)


@pytest.mark.parametrize("size", [50.0, 1e4])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_log_ratios_stay_finite_with_the_right_sign(size, sign):
    zero = torch.zeros(1)
    losses = {"ppo": ppo_loss, "grpo": lambda p, b, a: grpo_loss(p, b, torch.zeros(1), a, beta=0.1)}
    for divergence in RPG_TABLE:
        for estimator in ("differentiable", "reinforce"):
            form = {"beta": 0.1, "divergence": divergence, "estimator": estimator}
            losses[f"{divergence} {estimator}"] = lambda p, b, a, form=form: rpg_loss(
                p, b, a, **form
            )
    for name, loss in losses.items():
        policy = torch.tensor([sign * size], requires_grad=True)
        value = loss(policy, zero, torch.tensor([-1.0]))
        (grad,) = torch.autograd.grad(value.sum(), policy)
        assert value.isfinite().all(), name
        assert grad.isfinite().all(), name
        if sign > 0:  # a bad sample that became likely is pushed down, whatever the clamp
            assert grad.item() > 0, name


def test_errors_name_what_was_given():
    with pytest.raises(ShapeError, match=r"policy_logps \[2\], behavior_logps \[3\]"):
        ppo_loss(torch.zeros(2), torch.zeros(3), torch.zeros(2))
    with pytest.raises(ShapeError, match=r"returns \[2\]"):
        value_loss(torch.zeros(3), torch.zeros(3), torch.zeros(2))
    with pytest.raises(ConfigError, match=r"jeffreys.*forward_kl, reverse_kl"):
        rpg_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), beta=0.1, divergence="jeffreys")
