"""Risk ratios of log(reference / policy) under the reference: fractional tails, limits, monotony,
precision at 128k tokens.
"""

import math
from unittest.mock import patch

import pytest
import torch

import alignkit.risk as risk_module
from alignkit.errors import ConfigError
from alignkit.risk import risk_ratio


def laws(n, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw():
        logits = 3 * torch.randn(2, n, generator=generator, dtype=torch.float64)
        return logits.log_softmax(-1).to(dtype)

    return draw(), draw()


def test_cvar_splits_the_boundary_atom():
    """By hand: the tail of mass 0.6 takes the worst atom (0.5) whole and a fifth of the second (0.1
    of 0.3).
    """
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    policy = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64).log()
    x = reference - policy  # log 5, 0, -log 3: already from the worst on
    expected = (0.5 * x[0] + 0.1 * x[1]) / 0.6
    assert float(risk_ratio(policy, reference, risk="cvar", level=0.6)) == pytest.approx(
        float(expected), abs=1e-12
    )
    inside = risk_ratio(policy, reference, risk="cvar", level=0.2)  # a tail inside the worst atom
    assert float(inside) == pytest.approx(math.log(5), abs=1e-12)


def test_limits_of_the_level():
    policy, reference = laws(17)
    kl = (reference.exp() * (reference - policy)).sum(-1)
    torch.testing.assert_close(
        risk_ratio(policy, reference, risk="kl", level=1.0), kl, atol=1e-12, rtol=0
    )
    torch.testing.assert_close(
        risk_ratio(policy, reference, risk="cvar", level=1.0), kl, atol=1e-12, rtol=0
    )
    torch.testing.assert_close(
        risk_ratio(policy, reference, risk="erm", level=1e-7), kl, atol=1e-5, rtol=0
    )
    chi2 = ((2 * reference - policy).logsumexp(-1)).exp() - 1
    torch.testing.assert_close(
        risk_ratio(policy, reference, risk="erm", level=1.0), chi2.log1p(), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize(
    ("risk", "levels"), [("cvar", [0.05, 0.2, 0.5, 0.9, 1.0]), ("erm", [2.0, 1.0, 0.5, 0.1, 0.01])]
)
def test_monotone_in_the_level_and_never_below_the_kl(risk, levels):
    policy, reference = laws(40, seed=1)
    found = torch.stack([risk_ratio(policy, reference, risk=risk, level=level) for level in levels])
    assert (found.diff(dim=0) <= 1e-12).all()
    assert (found >= risk_ratio(policy, reference, risk="kl", level=1.0) - 1e-12).all()


@pytest.mark.parametrize(
    ("risk", "level"), [("kl", 1.0), ("cvar", 0.95), ("cvar", 0.3), ("erm", 0.5)]
)
def test_the_gradient_in_the_logits_is_policy_minus_tail_weights(risk, level):
    """d risk / d logits = policy - w with w >= 0 and sum 1: by autograd against central
    differences, and by its sum.
    """
    policy, reference = laws(9, seed=2)
    logits = policy.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: risk_ratio(z.log_softmax(-1), reference, risk=risk, level=level), (logits,)
    )
    (gradient,) = torch.autograd.grad(
        risk_ratio(logits.log_softmax(-1), reference, risk=risk, level=level).sum(), logits
    )
    weights = policy.exp() - gradient
    assert (weights >= -1e-12).all()
    torch.testing.assert_close(
        weights.sum(-1), torch.ones(2, dtype=torch.float64), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize(
    ("risk", "level"), [("kl", 1.0), ("cvar", 0.95), ("cvar", 0.5), ("erm", 0.5)]
)
def test_float32_matches_float64_at_vocabulary_128k(risk, level):
    policy, reference = laws(128_000, seed=3)
    wide = risk_ratio(policy, reference, risk=risk, level=level)
    narrow = risk_ratio(policy.float(), reference.float(), risk=risk, level=level)
    torch.testing.assert_close(narrow.double(), wide, atol=1e-5, rtol=1e-5)


def test_tokens_that_both_forbid_count_nothing():
    policy, reference = laws(6, seed=4)
    masked = [
        torch.cat([t, torch.full((2, 3), -torch.inf, dtype=t.dtype)], -1)
        for t in (policy, reference)
    ]
    for risk, level in (("kl", 1.0), ("cvar", 0.4), ("erm", 0.7)):
        expected = risk_ratio(policy, reference, risk=risk, level=level)
        torch.testing.assert_close(
            risk_ratio(*masked, risk=risk, level=level), expected, atol=1e-12, rtol=0
        )


@pytest.mark.parametrize(
    ("risk", "level"), [("cvar", 0.0), ("cvar", 1.1), ("erm", 0.0), ("var", 0.5)]
)
def test_levels_and_names_out_of_range_are_refused(risk, level):
    with pytest.raises(ConfigError):
        risk_ratio(*laws(4), risk=risk, level=level)


def test_tied_atoms_share_the_fraction_by_their_mass():
    """Where policy and reference agree every atom is at the boundary: the gradient is that of the
    KL.
    """
    reference = laws(9)[0]
    leaf = reference.clone().requires_grad_()
    gradient = torch.autograd.grad(risk_ratio(leaf, reference, "cvar", 0.3).sum(), leaf)[0]
    torch.testing.assert_close(gradient, -reference.exp(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("level", [0.05, 0.5, 0.95, 0.999999])
@pytest.mark.parametrize(
    "case",
    ["smooth", "one heavy token", "no difference", "a policy without a token", "no reference mass"],
)
def test_the_search_of_a_large_vocabulary_finds_what_the_sort_finds(case, level):
    """Values and gradients of CVaR at 20,000 tokens, where the boundary atom is searched for,
    against the sort.
    """
    rng = torch.Generator().manual_seed(3)
    reference = torch.randn(4, 20_000, generator=rng) * 3
    shift = torch.randn(4, 20_000, generator=rng) * 0.3
    if case == "one heavy token":
        reference[:, 7] += 14
    if case == "no reference mass":
        reference[:, ::2] = -math.inf
    reference = reference.log_softmax(-1)
    policy = torch.where(reference > -math.inf, reference, reference.new_tensor(-9.0)) + shift
    if case == "a policy without a token":
        reference[:, 5], policy[:, 5] = -math.inf, -math.inf
    policy = reference if case == "no difference" else policy.log_softmax(-1)
    found = []
    for limit in (1 << 30, risk_module.SORTED):
        with patch.object(risk_module, "SORTED", limit):
            leaf = policy.clone().requires_grad_()
            value = risk_ratio(leaf, reference, "cvar", level)
            found.append((value.detach(), torch.autograd.grad(value.sum(), leaf)[0]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=1e-6)
