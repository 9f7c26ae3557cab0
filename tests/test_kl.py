"""KL estimators: values in closed form and by enumeration, numerics at the extremes. Gradients:
oracles/test_gradients.py.
"""

import math
from decimal import Decimal, getcontext

import pytest
import torch

from alignkit import kl
from alignkit.errors import ConfigError, ShapeError

getcontext().prec = 60
POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
REFERENCE = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64).log()
BEHAVIOR = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64).log()
REVERSE = 0.5 * math.log(2.5) + 0.3 * math.log(1.5) + 0.2 * math.log(1 / 3)
FORWARD = 0.2 * math.log(0.4) + 0.2 * math.log(2 / 3) + 0.6 * math.log(3)


def mean(values, logps):
    return float((logps.exp() * values).sum())


def test_hand_written_values():
    a = torch.tensor([math.log(2.0)], dtype=torch.float64)
    assert kl.k1(a).item() == pytest.approx(0.6931471805599453, abs=1e-15)
    assert kl.k2(a).item() == pytest.approx(0.2402265069591007, abs=1e-15)
    assert kl.k3(a).item() == pytest.approx(0.1931471805599453, abs=1e-15)
    assert kl.k3_forward(a).item() == pytest.approx(0.3068528194400547, abs=1e-15)
    assert kl.straight_through(a).item() == pytest.approx(kl.k3(a).item(), abs=1e-15)
    assert kl.straight_through(a, kl.k1).item() == pytest.approx(kl.k1(a).item(), abs=1e-15)


def test_which_estimators_are_unbiased():
    a = POLICY - REFERENCE
    assert mean(kl.k1(a), POLICY) == pytest.approx(REVERSE, abs=1e-14)
    assert mean(kl.k3(a), POLICY) == pytest.approx(REVERSE, abs=1e-14)
    assert abs(mean(kl.k2(a), POLICY) - REVERSE) > 1e-3
    assert mean(kl.k3_forward(a), REFERENCE) == pytest.approx(FORWARD, abs=1e-14)


def test_off_policy_values_need_the_importance_weight():
    a, w = POLICY - REFERENCE, POLICY - BEHAVIOR
    for weighted in (kl.k1_weighted, kl.k3_weighted, kl.k3_stopped):
        assert mean(weighted(a, w), BEHAVIOR) == pytest.approx(REVERSE, abs=1e-14)
    for plain in (kl.k1, kl.k2, kl.k3):
        assert abs(mean(plain(a), BEHAVIOR) - REVERSE) > 1e-2


def test_exact_is_the_sum_over_the_vocabulary():
    assert kl.exact(POLICY, REFERENCE).item() == pytest.approx(REVERSE, abs=1e-15)
    assert kl.exact(POLICY, REFERENCE, "forward").item() == pytest.approx(FORWARD, abs=1e-15)
    assert kl.exact(REFERENCE, POLICY, "reverse").item() == pytest.approx(FORWARD, abs=1e-15)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_exact_with_masked_logits_is_the_kl_of_the_rest(direction):
    masked = torch.tensor([-torch.inf], dtype=torch.float64)
    policy = torch.cat([POLICY, masked]).requires_grad_()
    reference = torch.cat([REFERENCE, masked])
    value = kl.exact(policy, reference, direction)
    assert value.item() == pytest.approx(REVERSE if direction == "reverse" else FORWARD, abs=1e-15)
    (grad,) = torch.autograd.grad(value, policy)
    assert grad.isfinite().all()
    assert grad[-1] == 0


def test_exact_is_infinite_without_support_and_ignores_the_second_distribution_s_extra_mass():
    holed = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    assert kl.exact(REFERENCE, holed).item() == math.inf
    expected = 0.5 * math.log(0.5 / 0.2) * 2
    assert kl.exact(holed, REFERENCE).item() == pytest.approx(expected, abs=1e-15)
    assert kl.exact(holed, holed).item() == 0


def test_exact_refuses_unknown_directions_and_different_shapes():
    with pytest.raises(ConfigError, match=r"sideways.*'reverse' or 'forward'"):
        kl.exact(POLICY, REFERENCE, "sideways")
    with pytest.raises(ShapeError, match=r"policy_logprobs \[3\].*reference_logprobs \[2\]"):
        kl.exact(POLICY, REFERENCE[:2])


def exact_k3(a: float) -> tuple[float, float]:
    """Value and derivative of exp(-a) - 1 + a to 60 digits."""
    x = Decimal(a)
    return float((-x).exp() - 1 + x), float(1 - (-x).exp())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-14), (torch.float32, 1e-5)])
def test_k3_keeps_its_digits_near_zero(dtype, tolerance):
    sizes = [1e-12, 1e-8, 1e-5, 1e-4, 1e-3, 0.0199, 0.0201, 0.1, 1.0, 5.0]
    a = torch.tensor(
        [sign * size for size in sizes for sign in (1, -1)], dtype=dtype, requires_grad=True
    )
    values = kl.k3(a)
    (slopes,) = torch.autograd.grad(values.sum(), a)
    for x, value, slope in zip(a.tolist(), values.tolist(), slopes.tolist()):
        expected, derivative = exact_k3(x)
        assert value == pytest.approx(expected, rel=tolerance), x
        assert slope == pytest.approx(derivative, rel=tolerance), x
        assert value > 0
    assert kl.k3(torch.zeros(1, dtype=dtype)).item() == 0


@pytest.mark.parametrize("size", [50.0, 1e4])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extremes_are_finite_with_the_right_sign(size, sign):
    for name, estimator in {
        "k2": kl.k2,
        "k3": kl.k3,
        "straight_through": kl.straight_through,
        "k2_weighted": lambda x: kl.k2_weighted(x, x),
        "k3_stopped": lambda x: kl.k3_stopped(x, x),
    }.items():
        a = torch.tensor([sign * size], requires_grad=True)
        value = estimator(a)
        (slope,) = torch.autograd.grad(value.sum(), a)
        assert value.isfinite().all(), name
        assert slope.isfinite().all(), name
        assert value.item() > 0, name
        assert slope.item() * sign > 0, name


def test_the_clamp_limits_the_value_and_passes_the_gradient():
    a = torch.tensor([-1e4, -20.0, -19.5, 0.3, 19.5, 1e4], dtype=torch.float64, requires_grad=True)
    clamped = kl.clamp_log_ratio(a)
    assert clamped.tolist() == pytest.approx([-20, -20, -19.5, 0.3, 19.5, 20], abs=1e-9)
    (grad,) = torch.autograd.grad(clamped.sum(), a)
    assert grad.tolist() == [1.0] * 6


def test_importance_is_the_ratio_of_probabilities():
    assert torch.allclose(
        kl.importance(POLICY, BEHAVIOR), POLICY.exp() / BEHAVIOR.exp(), rtol=1e-14
    )
    with pytest.raises(ShapeError):
        kl.importance(POLICY, BEHAVIOR[:2])
