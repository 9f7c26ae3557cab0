"""Dr. GRPO, REINFORCE++, DAPO, GSPO and CISPO: expected gradients by enumeration, limits, numbers
by hand.
"""

import math
from dataclasses import replace

import pytest
import torch

from alignkit import CISPO, DAPO, GRPO, GSPO, LUSPO, DrGRPO, ReinforcePlusPlus
from alignkit.batches import RolloutBatch, TokenLogps
from alignkit.credit import whiten
from alignkit.errors import ConfigError, ShapeError
from alignkit.losses import cispo_loss, grpo_loss, gspo_loss
from alignkit.objectives.online.dapo import overlong_penalty
from alignkit.oracles.gradients import (
    Population,
    gradient,
    misalignment,
    regularised_value,
    token_kl,
)
from alignkit.policies.tabular import Tree

F64 = torch.float64
REWARD = torch.tensor([1.0, -0.5, 0.3, 2.0, 0.0, -1.0, 0.7, 1.5, -0.2], dtype=F64)


@pytest.fixture(scope="module")
def population():
    return Population.build()


def value_gradient(population, reward, beta=0.0):
    """-grad of E[reward] - beta KL at the sampling policy."""
    return gradient(
        lambda t: -regularised_value(population.tree, t, reward, population.reference, beta),
        population.theta,
    )


# ---------------------------------------------------------------- what the first step follows


def test_dr_grpo_follows_the_expected_score(population):
    """Exactly, up to (K - 1) / K for the mean that counts the completion itself, and 1 / length."""
    found = population.delivered(DrGRPO(length=5), REWARD)
    torch.testing.assert_close(
        found, value_gradient(population, REWARD) / (2 * 5), atol=1e-12, rtol=0
    )
    assert (
        misalignment(population.delivered(GRPO(beta=0), REWARD), value_gradient(population, REWARD))
        > 1e-3
    )


def test_reinforce_plus_plus_follows_the_penalised_score(population):
    wanted = value_gradient(population, REWARD, beta=0.3)
    assert misalignment(population.delivered(ReinforcePlusPlus(beta=0.3), REWARD), wanted) < 1e-10
    assert misalignment(population.delivered(ReinforcePlusPlus(beta=0.35), REWARD), wanted) > 1e-3


def test_reinforce_plus_plus_baseline_adds_the_partial_kl(population):
    """Whitening by the spread of score - group mean, k2's gradient beside it; completions of two
    tokens, averaged over tokens.
    """
    tree, n = population.tree, len(population.rows)
    scores = REWARD[population.rows].view(-1, 2)
    spread = (scores - scores.mean(-1, keepdim=True)).pow(2).mean().sqrt()
    kl = gradient(lambda t: token_kl(tree, t, population.reference), population.theta)
    wanted = (value_gradient(population, REWARD) / (2 * spread) + 0.3 * kl) / 2
    found = population.delivered(ReinforcePlusPlus(beta=0.3, baseline="group"), REWARD)
    # whitening adds 1e-8 to the variance
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=0)
    assert n == 2 * len(scores)


def test_on_policy_dapo_gspo_and_cispo_are_grpo(population):
    """Where the policy is the sampler every ratio is 1 and A grad log pi is all there is; lengths
    are equal here.
    """
    wanted = population.delivered(GRPO(beta=0, aggregation="token_mean"), REWARD)
    differ = 1 - population_share_of_equal_scores(population)
    torch.testing.assert_close(population.delivered(CISPO(), REWARD), wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(population.delivered(GSPO(), REWARD), wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(
        population.delivered(DAPO(), REWARD), wanted / differ, atol=1e-12, rtol=0
    )


def population_share_of_equal_scores(population):
    first, second = population.rows.view(-1, 2).T
    return (first == second).double().mean()


def test_off_policy_cispo_is_exact_for_one_token():
    """Without bounds E_old[w A grad log pi] is the gradient of E_policy[A], whatever policy the
    completions came from.
    """
    population = Population.build(Tree.build(6, 1, eos=False))
    reward = REWARD[:6]
    theta = population.theta + torch.randn(
        population.theta.shape, dtype=F64, generator=torch.Generator().manual_seed(2)
    )
    found = population.delivered(CISPO(clip_high=None, scale_by_std=False), reward, at=theta)
    wanted = gradient(
        lambda t: -(population.tree.sequence_logps(t).exp() * reward).sum() / 2, theta
    )
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


# ---------------------------------------------------------------- limits and numbers


def ratios(values, advantages, loss, **options):
    """Value and gradient of a loss at importance ratios `values`, policy log-probs log w."""
    policy = torch.tensor(values, dtype=F64).log().requires_grad_()
    out = loss(policy, torch.zeros_like(policy), torch.tensor(advantages, dtype=F64), **options)
    return out.tolist(), torch.autograd.grad(out.sum(), policy)[0].tolist()


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    loss, grad = ratios([0.5, 2.0, 2.0], [1.0, 1.0, -3.0], cispo_loss, clip_low=0.2, clip_high=0.5)
    assert grad == pytest.approx([-0.8, -1.5, 4.5], abs=1e-12)
    assert loss == pytest.approx(
        [0.8 * math.log(2), -1.5 * math.log(2), 4.5 * math.log(2)], abs=1e-12
    )
    assert ratios([0.01, 50.0], [1.0, 1.0], cispo_loss)[1] == pytest.approx(
        [-0.01, -50.0], abs=1e-12
    )


def test_gspo_takes_the_geometric_mean_and_shares_its_gradient_among_the_tokens():
    policy = torch.tensor([[math.log(4.0), 0.0, 9.0]], dtype=F64, requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    options = {"clip_low": 0.5, "clip_high": 1.5}
    loss = gspo_loss(
        policy, torch.zeros_like(policy), torch.tensor([3.0], dtype=F64), mask, **options
    )
    assert loss.item() == pytest.approx(-6.0, abs=1e-12)  # s = sqrt(4 * 1)
    assert torch.autograd.grad(loss, policy)[0].tolist()[0] == pytest.approx(
        [-3.0, -3.0, 0.0], abs=1e-12
    )
    tight = gspo_loss(
        policy,
        torch.zeros_like(policy),
        torch.tensor([3.0], dtype=F64),
        mask,
        clip_low=0.2,
        clip_high=0.2,
    )
    assert tight.item() == pytest.approx(-3.6, abs=1e-12)
    with pytest.raises(ShapeError, match=r"advantages \[2\]"):
        gspo_loss(policy, policy, torch.zeros(2, dtype=F64), mask)


def one_token_rollout(n=8):
    noise = torch.Generator().manual_seed(0)
    policy, old = -3 * torch.rand(2, n, 1, dtype=F64, generator=noise)
    mask = torch.ones(n, 1, dtype=torch.bool)
    return RolloutBatch(
        TokenLogps(policy, {}, mask, old),
        torch.randn(n, dtype=F64, generator=noise),
        torch.arange(n) // 4,
    )


def test_gspo_with_one_token_completions_is_grpo():
    clip = {"clip_low": 0.2, "clip_high": 0.3}
    batch = one_token_rollout()
    values = []
    for objective in (GSPO(**clip), GRPO(beta=0, aggregation="sequence_sum", **clip)):
        credited, _ = objective.credit(batch, {})
        (term,) = objective.loss(credited).terms
        values.append(term.values)
    torch.testing.assert_close(*values, atol=1e-15, rtol=0)


# ---------------------------------------------------------------- one ratio for each completion


def drifted_rollout(scores=(1.0, -2.0)):
    """Two completions of 3 and 2 tokens, away from the policy that sampled them."""
    noise = torch.Generator().manual_seed(4)
    policy, old = -3 * torch.rand(2, 2, 3, dtype=F64, generator=noise)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    tokens = TokenLogps(policy.requires_grad_(), {"reference": old - 0.3}, mask, old)
    return RolloutBatch(tokens, torch.tensor(scores, dtype=F64), torch.zeros(2, dtype=torch.long))


def loss_and_gradient(objective, batch):
    """The sum of a rollout's loss, divided as the loop divides it, and its gradient [N, T]."""
    credited, _ = objective.credit(batch, {})
    counts = {"rows": 2, "tokens": batch.tokens.mask.sum()}
    terms = objective.loss(credited).terms
    loss = sum(term.weight * term.values.sum() / counts[term.unit] for term in terms)
    return loss, torch.autograd.grad(loss, batch.tokens.policy)[0]


WIDE = {"clip_low": None, "clip_high": None}


@pytest.mark.parametrize("clip", [WIDE, {"clip_low": 1e-3, "clip_high": 1e-3}])
def test_a_ratio_per_completion_is_gspo(clip):
    """Averaged over completions GSPO itself, added up over tokens LUSPO, whatever the lengths."""
    batch = drifted_rollout()
    for whole, aggregation in ((GSPO(**clip), "sequence_mean"), (LUSPO(**clip), "sequence_sum")):
        per_token = GRPO(beta=0, ratio="sequence", aggregation=aggregation, **clip)
        found = loss_and_gradient(per_token, batch)
        torch.testing.assert_close(found, loss_and_gradient(whole, batch), atol=1e-14, rtol=0)
        own = loss_and_gradient(per_token.model_copy(update={"ratio": "token"}), batch)
        assert (own[1] - found[1]).abs().max() > 1e-3


def test_a_token_keeps_its_own_credit_under_its_completions_ratio():
    """The ratio of (4, 1) is 2 at both tokens; an advantage of the first alone moves the first alone."""
    policy = torch.tensor([[math.log(4.0), 0.0, 9.0]], dtype=F64, requires_grad=True)
    zero = torch.zeros(1, 3, dtype=F64)
    mask = torch.tensor([[True, True, False]])
    credit = torch.tensor([[3.0, 0.0, 0.0]], dtype=F64)
    loss = grpo_loss(policy, zero, zero, credit, beta=0.0, mask=mask)
    assert loss[mask].tolist() == pytest.approx([-6.0, 0.0], abs=1e-12)
    assert torch.autograd.grad(loss[mask].sum(), policy)[0][0].tolist() == pytest.approx(
        [-6.0, 0.0, 0.0], abs=1e-12
    )


def test_the_kl_is_weighted_by_the_completions_ratio():
    policy = torch.tensor([[math.log(4.0), 0.0]], dtype=F64)
    zero = torch.zeros(1, 2, dtype=F64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = grpo_loss(policy, zero, zero, zero, beta=1.0, kl="k3_weighted", mask=mask)
    own = 1 / 4 - 1 + math.log(4.0)  # k3 of the first token
    assert loss[0].tolist() == pytest.approx([2 * own, 0.0], abs=1e-12)


def test_cispos_weight_may_be_the_completions():
    policy = torch.tensor([[math.log(4.0), 0.0]], dtype=F64, requires_grad=True)
    zero = torch.zeros(1, 2, dtype=F64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    for high, weight in ((None, 2.0), (0.5, 1.5)):
        loss = cispo_loss(policy, zero, zero + 1, clip_high=high, mask=mask)
        assert torch.autograd.grad(loss.sum(), policy)[0].tolist()[0] == pytest.approx(
            [-weight, -weight], abs=1e-12
        )


@pytest.mark.parametrize("objective", [GRPO(ratio="sequence"), CISPO(ratio="sequence")])
def test_an_episode_that_was_cut_has_no_ratio_of_its_own(objective):
    batch = drifted_rollout()
    tokens = replace(batch.tokens, whole_lengths=torch.tensor([5, 2]))
    credited, _ = objective.credit(replace(batch, tokens=tokens), {})
    with pytest.raises(ConfigError, match="an episode was cut into several"):
        objective.loss(credited)


def test_dapo_leaves_out_groups_that_agree():
    """Two groups, one without a difference: the token mean runs over the other's tokens, 3 of 8."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0]]).bool()
    scores = torch.tensor([1.0, 1.0, 0.0, 2.0], dtype=F64)
    batch = RolloutBatch(
        TokenLogps(torch.zeros(4, 3, dtype=F64), {}, mask, torch.zeros(4, 3, dtype=F64)),
        scores,
        torch.arange(4) // 2,
    )
    kept, _ = DAPO(scale_by_std=False).credit(batch, {})
    assert kept.advantages[2:].tolist() == [[-8 / 3, 0.0, 0.0], [8 / 3, 8 / 3, 0.0]]
    assert (kept.advantages[:2] == 0).all()
    plain, _ = DAPO(scale_by_std=False, drop_constant=False).credit(batch, {})
    assert plain.advantages[3].tolist() == [1.0, 1.0, 0.0]
    nothing, _ = DAPO().credit(replace(batch, scores=torch.ones(4, dtype=F64)), {})
    assert (nothing.advantages == 0).all()


def test_dapo_overlong_penalty():
    lengths = torch.tensor([5, 6, 7, 9, 10, 12])
    assert overlong_penalty(lengths, limit=10, buffer=4).tolist() == [
        0.0,
        0.0,
        -0.25,
        -0.75,
        -1.0,
        -1.0,
    ]
    mask = torch.arange(4) < torch.tensor([4, 2])[:, None]
    batch = RolloutBatch(
        TokenLogps(torch.zeros(2, 4), {}, mask, torch.zeros(2, 4)), torch.zeros(2), torch.zeros(2)
    )
    credited, _ = DAPO(overlong_limit=4, overlong_buffer=2, scale_by_std=False).credit(batch, {})
    assert credited.advantages[:, 0].tolist() == [-0.5, 0.5]


def test_reinforce_plus_plus_credits_a_token_with_what_follows_it():
    policy = torch.tensor([[-1.0, -2.0], [-1.5, 0.0]], dtype=F64)
    reference = torch.tensor([[-1.5, -1.0], [-1.0, 0.0]], dtype=F64)
    mask = torch.tensor([[True, True], [True, False]])
    batch = RolloutBatch(
        TokenLogps(policy, {"reference": reference}, mask, policy),
        torch.tensor([1.0, 2.0], dtype=F64),
        torch.arange(2),
    )
    credited, _ = ReinforcePlusPlus(beta=0.1).credit(batch, {})
    raw = torch.tensor([[1 - 0.05 + 0.1, 1 + 0.1], [2 + 0.05, 0.0]], dtype=F64)
    torch.testing.assert_close(credited.advantages, whiten(raw, mask), atol=1e-14, rtol=0)
