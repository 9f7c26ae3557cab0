"""Distillation and matching losses: exact values, gradients, limits, and enumerated expectations."""

import pytest
import torch

from alignkit.errors import ConfigError, ShapeError
from alignkit.losses import (
    distillation_loss,
    dph_loss,
    fdpg_loss,
    kdrl_loss,
    minillm_advantages,
    opd_loss,
    pld_loss,
    ppo_loss,
    trajectory_balance_loss,
)
from alignkit.objectives.vocabulary_divergences import NAMES

EXACT = {"rtol": 0, "atol": 1e-12}
INF = float("inf")


def laws(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


def kl(first, second):
    return (first.exp() * (first - second)).sum(-1)


def test_values_are_their_formulas():
    policy, teacher = laws(4, 7, seed=1), laws(4, 7, seed=2)

    def mix(share):
        return (share * teacher.exp() + (1 - share) * policy.exp()).log()

    expected = {
        "forward_kl": kl(teacher, policy),
        "reverse_kl": kl(policy, teacher),
        "jsd": 0.3 * kl(teacher, mix(0.3)) + 0.7 * kl(policy, mix(0.3)),
        "skew_kl": kl(teacher, mix(0.2)),
        "skew_reverse_kl": kl(policy, mix(0.8)),
        "total_variation": 0.5 * (teacher.exp() - policy.exp()).abs().sum(-1),
    }
    for name, value in expected.items():
        loss = distillation_loss(policy, teacher, divergence=name, beta=0.3, alpha=0.2)
        torch.testing.assert_close(loss, value, **EXACT)


def test_jsd_is_its_skewed_parts_and_swaps():
    policy, teacher = laws(5, 6, seed=3), laws(5, 6, seed=4)
    jsd = distillation_loss(policy, teacher, divergence="jsd", beta=0.3)
    skew = distillation_loss(policy, teacher, divergence="skew_kl", alpha=0.3)
    skew_reverse = distillation_loss(policy, teacher, divergence="skew_reverse_kl", alpha=0.7)
    torch.testing.assert_close(jsd, 0.3 * skew + 0.7 * skew_reverse, **EXACT)
    swapped = distillation_loss(teacher, policy, divergence="jsd", beta=0.7)
    torch.testing.assert_close(jsd, swapped, **EXACT)


def test_akl_takes_the_papers_head():
    """Teacher .5 .3 .2: mu = .5 has a head of one token, mu = .6 of two, mu = 1 of all."""
    teacher = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64).log()
    policy = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()
    gaps = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    forward, reverse = kl(teacher, policy), kl(policy, teacher)
    for mu, head_gap in ((0.5, gaps[1]), (0.6, gaps[0] + gaps[1]), (1.0, gaps.sum())):
        share = head_gap / gaps.sum()
        loss = distillation_loss(policy, teacher, divergence="akl", mu=mu)
        torch.testing.assert_close(loss, share * forward + (1 - share) * reverse, **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_zero_at_the_teacher_never_negative_and_centred_gradients(name):
    teacher = laws(3, 9)
    same = teacher.clone().requires_grad_()
    loss = distillation_loss(same, teacher, divergence=name)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-15)

    logits = laws(3, 9, seed=5).requires_grad_()
    loss = distillation_loss(logits, teacher, divergence=name)
    assert bool((loss > 0).all())
    gradient = torch.autograd.grad(loss.sum(), logits)[0]
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(3, dtype=torch.float64), **EXACT)
    if name == "forward_kl":
        torch.testing.assert_close(gradient, logits.softmax(-1) - teacher.exp(), **EXACT)
    if name == "reverse_kl":
        p = logits.log_softmax(-1)
        wanted = p.exp() * (p - teacher - loss.unsqueeze(-1))
        torch.testing.assert_close(gradient, wanted.detach(), **EXACT)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_apart_and_nearly_equal_laws_in_narrow_types(name, dtype):
    far = torch.zeros(2, 4, dtype=dtype)
    far[0, 0] = far[1, 1] = 1e4
    policy = far.clone().requires_grad_()
    loss = distillation_loss(policy, far.flip(0), divergence=name)
    gradient = torch.autograd.grad(loss.sum(), policy)[0]
    assert loss.dtype == torch.float32
    assert bool(loss.isfinite().all() and gradient.isfinite().all())
    assert bool((loss >= 0).all())

    near = laws(200, 50).to(dtype)
    nudged = (near.float() * (1 + 1e-6)).to(dtype)
    assert bool((distillation_loss(nudged, near, divergence=name) >= 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_impossible_tokens(name):
    both = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    skewed = torch.tensor([0.2, 0.8, 0.0], dtype=torch.float64).log().requires_grad_()
    loss = distillation_loss(skewed, both, divergence=name)
    gradient = torch.autograd.grad(loss, skewed)[0]
    short = distillation_loss(skewed.detach()[:2], both[:2], divergence=name)
    torch.testing.assert_close(loss.detach(), short, **EXACT)
    assert bool(gradient.isfinite().all())
    assert gradient[2] == 0

    full = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64).log()
    alone = distillation_loss(full, both, divergence=name)
    if name == "reverse_kl":
        assert alone == INF
    elif name != "akl":  # a part of it is the reverse KL
        assert bool(alone.isfinite())


def test_temperature_divides_and_adds_no_factor():
    policy, teacher = laws(2, 5, seed=1), laws(2, 5, seed=2)
    warm = distillation_loss(policy, teacher, temperature=2.0)
    expected = kl((teacher / 2).log_softmax(-1), (policy / 2).log_softmax(-1))
    torch.testing.assert_close(warm, expected, **EXACT)


def test_distillation_refuses_what_is_out_of_range():
    one = laws(3)
    for options in (
        {"divergence": "kl"},
        {"divergence": "jsd", "beta": 0.0},
        {"divergence": "jsd", "beta": 1.0},
        {"alpha": 1.0},
        {"mu": 0.0},
        {"temperature": 0.0},
    ):
        with pytest.raises(ConfigError):
            distillation_loss(one, one, **options)
    with pytest.raises(ShapeError):
        distillation_loss(one, laws(4))


def test_pld_is_the_ranking_written_out():
    policy = laws(5, seed=6).requires_grad_()
    teacher = laws(5, seed=7)
    label = 2
    order = [label, *[i for i in teacher.argsort(descending=True).tolist() if i != label]]
    expected = sum(
        teacher[i].exp() * (policy[order[k:]].logsumexp(0) - policy[i]) for k, i in enumerate(order)
    )
    loss = pld_loss(policy, teacher, torch.tensor(label))
    torch.testing.assert_close(loss, expected, **EXACT)

    sure = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64).log()
    torch.testing.assert_close(pld_loss(policy, sure, torch.tensor(label)), -policy[label], **EXACT)
    with pytest.raises(ShapeError):
        pld_loss(policy, teacher, torch.tensor([1, 2]))


def test_opd_has_the_gradient_of_the_reverse_kl_at_each_prefix():
    """Enumerated over one token, sampled from the policy itself."""
    logits = laws(6, seed=1).requires_grad_()
    teacher = laws(6, seed=2)
    policy = logits.log_softmax(-1)
    per_token = opd_loss(policy[:, None], policy.detach()[:, None], teacher[:, None])[:, 0]
    mean = (policy.detach().exp() * per_token).sum()
    gradient = torch.autograd.grad(mean, logits, retain_graph=True)[0]
    exact = torch.autograd.grad(kl(policy, teacher), logits)[0]
    torch.testing.assert_close(gradient, exact, **EXACT)


def test_kdrl_is_ppo_plus_k2_and_masks_rows():
    policy, behavior, teacher = (laws(3, 4, seed=s) for s in range(3))
    advantages = laws(3, 4, seed=9)
    scores = torch.tensor([1.0, 0.0, -1.0])
    k2 = 0.5 * (policy - teacher) ** 2
    plain = ppo_loss(policy, behavior, advantages)
    loss = kdrl_loss(policy, behavior, teacher, advantages, kd_weight=0.1)
    torch.testing.assert_close(loss, plain + 0.1 * k2, **EXACT)
    masked = kdrl_loss(
        policy, behavior, teacher, advantages, kd_weight=0.1, scores=scores, masking="response"
    )
    torch.testing.assert_close(masked[0], plain[0], **EXACT)
    torch.testing.assert_close(masked[1:], loss[1:], **EXACT)
    with pytest.raises(ConfigError, match="scores"):
        kdrl_loss(policy, behavior, teacher, advantages, kd_weight=0.1, masking="response")


def test_minillm_advantages_by_hand():
    policy = torch.zeros(1, 4, dtype=torch.float64)
    teacher = torch.tensor([[1.0, float("nan"), 2.0, 4.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True]])
    plain = minillm_advantages(policy, teacher, mask, gamma=0.5)
    assert plain.tolist() == [[1 + 1 + 1, 0, 2 + 2, 4]]
    normalised = minillm_advantages(policy, teacher, mask, gamma=0.5, length_normalised=True)
    torch.testing.assert_close(
        normalised, torch.tensor([[3 / 1.75, 0, 4 / 1.5, 4]], dtype=torch.float64), **EXACT
    )


def test_minillm_has_the_gradient_of_the_sequence_reverse_kl():
    """Two tokens of three symbols, enumerated; the policy's second law depends on the first."""
    first = laws(3, seed=1).requires_grad_()
    second = laws(3, 3, seed=2).requires_grad_()
    teacher_first, teacher_second = laws(3, seed=3), laws(3, 3, seed=4)
    p1, p2 = first.log_softmax(-1), second.log_softmax(-1)
    policy = torch.stack([p1[:, None].expand(3, 3), p2], dim=-1).reshape(9, 2)
    teacher = torch.stack([teacher_first[:, None].expand(3, 3), teacher_second], dim=-1).reshape(
        9, 2
    )
    joint = policy.sum(-1)
    exact = torch.autograd.grad(
        (joint.exp() * (joint - teacher.sum(-1))).sum(), (first, second), retain_graph=True
    )
    advantages = minillm_advantages(policy, teacher, torch.ones(9, 2, dtype=torch.bool))
    loss = -(joint.detach().exp() * (advantages * policy).sum(-1)).sum()
    for gradient, wanted in zip(torch.autograd.grad(loss, (first, second)), exact):
        torch.testing.assert_close(gradient, wanted, **EXACT)


def test_dph_has_the_gradient_of_the_sequence_forward_kl():
    logits = laws(5, seed=1).requires_grad_()
    reference = laws(5, seed=2)
    policy = logits.log_softmax(-1)
    loss = (reference.exp() * dph_loss(policy, reference, divergence="forward_ukl")).sum()
    gradient = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    exact = torch.autograd.grad(kl(reference, policy), logits)[0]
    torch.testing.assert_close(gradient, exact, **EXACT)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon", "neyman_chi2"])
def test_fdpg_has_the_gradient_of_its_divergence(name):
    """Enumerated under another sampler; the reverse KL's is also grad J / -beta."""
    from alignkit import divergences

    logits = laws(6, seed=1, scale=0.5).requires_grad_()
    behavior, reference = laws(6, seed=2, scale=0.5), laws(6, seed=3, scale=0.5)
    scores = laws(6, seed=4, scale=0.5)
    log_z = (reference + scores / 0.7).logsumexp(0)
    target = reference + scores / 0.7 - log_z
    policy = logits.log_softmax(-1)
    per_row = fdpg_loss(
        policy, behavior, reference, scores, log_z.expand(6), beta=0.7, divergence=name
    )
    gradient = torch.autograd.grad((behavior.exp() * per_row).sum(), logits, retain_graph=True)[0]
    divergence = (target.exp() * divergences.get(name).f(policy - target)).sum()
    exact = torch.autograd.grad(divergence, logits, retain_graph=True)[0]
    torch.testing.assert_close(gradient, exact, **EXACT)
    if name == "reverse_kl":
        objective = (policy.exp() * scores).sum() - 0.7 * kl(policy, reference)
        ascent = torch.autograd.grad(objective, logits)[0]
        torch.testing.assert_close(gradient, -ascent / 0.7, **EXACT)


def test_trajectory_balance_is_zero_at_the_tilt_alone():
    reference, scores = laws(6, seed=1), laws(6, seed=2)
    log_z = (reference + scores / 0.4).logsumexp(0)
    optimum = reference + scores / 0.4 - log_z
    at_optimum = trajectory_balance_loss(optimum, reference, scores, log_z.expand(6), beta=0.4)
    torch.testing.assert_close(at_optimum, torch.zeros(6, dtype=torch.float64), **EXACT)

    logits = laws(6, seed=3).requires_grad_()
    policy = logits.log_softmax(-1)
    loss = trajectory_balance_loss(policy, reference, scores, log_z.expand(6), beta=0.4)
    gradient = torch.autograd.grad((policy.detach().exp() * loss).sum(), logits, retain_graph=True)[
        0
    ]
    exact = torch.autograd.grad(2 * kl(policy, optimum), logits)[0]
    torch.testing.assert_close(gradient, exact, **EXACT)
    with pytest.raises(ConfigError, match="beta"):
        trajectory_balance_loss(policy, reference, scores, log_z.expand(6), beta=0.0)
