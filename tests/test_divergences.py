"""f-divergences: derivatives and inverses against each other, stability at any log-ratio, what is
inadmissible.
"""

import pytest
import torch

from alignkit import divergences
from alignkit.errors import ConfigError
from alignkit.losses import dpo_loss, fdpo_loss

NAMED = [
    ("alpha", {"alpha": 0.3}),
    *((n, {}) for n in ("reverse_kl", "forward_kl", "jensen_shannon", "hellinger", "jeffreys")),
]
NAMED += [("neyman_chi2", {}), ("chi2_kl", {})]


@pytest.mark.parametrize(("name", "params"), NAMED, ids=[n for n, _ in NAMED])
def test_f_is_convex_zero_at_one_and_f_prime_is_its_derivative(name, params):
    d = divergences.get(name, **params)
    log_ratio = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    assert float(d.f(zero)) == pytest.approx(0, abs=1e-12)
    (by_log,) = torch.autograd.grad(d.f(log_ratio).sum(), log_ratio)
    difference = by_log / log_ratio.detach().exp() - d.f_prime(log_ratio).detach()
    # a constant in f' shifts every reward alike
    assert float(difference.max() - difference.min()) < 1e-10
    assert (d.f_prime(log_ratio).diff() > 0).all()
    back = d.f_prime_inverse(d.f_prime(log_ratio).detach())  # the inverse gives the log-ratio back
    torch.testing.assert_close(back, log_ratio.detach(), atol=1e-8, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "params"), NAMED, ids=[n for n, _ in NAMED])
def test_loss_and_gradient_stay_finite_with_the_right_sign(name, params, dtype):
    divergence = divergences.get(name, **params)
    ratios = torch.tensor([-1e4, -160.0, -50.0, 0.0, 50.0, 160.0, 1e4], dtype=dtype)
    chosen, rejected = (
        t.reshape(-1).clone().requires_grad_()
        for t in torch.meshgrid(ratios, ratios, indexing="ij")
    )
    zero = torch.zeros_like(chosen)
    loss = fdpo_loss(chosen, rejected, zero, zero, beta=0.1, divergence=divergence)
    up, down = torch.autograd.grad(loss.sum(), (chosen, rejected))
    assert loss.isfinite().all()
    assert up.isfinite().all()
    assert down.isfinite().all()
    assert (up <= 0).all()
    assert (down >= 0).all()


def test_reverse_kl_is_dpo_and_alpha_runs_between_the_kls():
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(4)]
    same = fdpo_loss(*pair, beta=0.3, divergence="reverse_kl")
    torch.testing.assert_close(same, dpo_loss(*pair, beta=0.3), atol=1e-14, rtol=0)
    for alpha, name in ((1e-7, "reverse_kl"), (1 - 1e-7, "forward_kl")):
        near = fdpo_loss(*pair, beta=0.3, divergence=divergences.get("alpha", alpha=alpha))
        torch.testing.assert_close(
            near, fdpo_loss(*pair, beta=0.3, divergence=name), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("name", ["pearson_chi2", "total_variation", "nonsense"])
def test_inadmissible_ones_are_refused_with_the_reason(name):
    with pytest.raises(ConfigError, match=name):
        divergences.get(name)


@pytest.mark.parametrize("q", [0.2, 0.5, 0.9])
def test_tsallis_kl_is_the_alpha_divergence(q):
    """E_policy[((policy / reference)^(q - 1) - 1) / (q - 1)] (Zhu et al. 2023, arXiv:2301.11476) is q
    times `alpha` at alpha = 1 - q.
    """
    noise = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 7, dtype=torch.float64, generator=noise).log_softmax(-1)
    log_ratio = policy - reference

    def tsallis(order):
        return (policy.exp() * torch.expm1((order - 1) * log_ratio)).sum() / (order - 1)

    f = divergences.get("alpha", alpha=1 - q).f
    torch.testing.assert_close(q * (reference.exp() * f(log_ratio)).sum(), tsallis(q))
