"""RAFT: what is kept, the expected gradient over all draws, and the mixture it comes to rest at."""

from itertools import product

import torch

from alignkit import RAFT
from alignkit.batches import RolloutBatch, TokenLogps
from alignkit.decoding import best_of_n
from alignkit.kl import exact
from alignkit.objectives.online.raft import kept_shares
from alignkit.oracles.optima import minimise

F64 = torch.float64
REWARDS = torch.tensor([0.3, -1.0, 2.0, 0.3], dtype=F64)


def test_ties_share_and_small_groups_choose_nothing():
    scores = torch.tensor([3.0, 1.0, 3.0, 0.0, 5.0, 7.0, 2.0], dtype=F64)
    groups = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    assert kept_shares(scores, groups, 1).tolist() == [0.5, 0, 0.5, 0, 0, 1, 0]
    assert kept_shares(scores, groups, 2).tolist() == [1, 0, 1, 0, 0, 0, 0]
    assert kept_shares(scores, groups, 3).tolist() == [1, 1, 1, 0, 0, 0, 0]


def all_draws(logits, reference, n):
    """Every pool of `n` one-token responses as one group each, with the pools' probabilities."""
    policy = logits.log_softmax(-1)
    pools = list(product(range(len(REWARDS)), repeat=n))
    responses = torch.tensor(pools).flatten()
    groups = torch.arange(len(pools)).repeat_interleave(n)
    tokens = TokenLogps(
        policy[responses, None],
        {"reference": reference[responses, None]},
        torch.ones(len(responses), 1, dtype=torch.bool),
        policy[responses, None].detach(),
        {"forward_kl": exact(policy, reference, "forward").expand(len(responses), 1)},
    )
    probability = policy.detach()[torch.tensor(pools)].sum(-1).exp()
    return RolloutBatch(tokens, REWARDS[responses], groups), probability


def test_the_expected_gradient_is_the_likelihood_of_the_best():
    """-sum over y of pi_n(y) grad log pi(y), with pi_n the law of best-of-n held fixed."""
    n = 3
    objective = RAFT(beta=0.0)
    logits = torch.tensor([0.2, 1.0, -0.5, 0.1], dtype=F64, requires_grad=True)
    batch, probability = all_draws(logits, torch.zeros(4, dtype=F64).log_softmax(-1), n)
    credited, _ = objective.credit(batch, {})
    values = objective.loss(credited).terms[0].values.view(-1, n).mean(-1)
    gradient = torch.autograd.grad((probability * values).sum(), logits)[0]

    best = best_of_n(logits.detach().softmax(-1), REWARDS, n)
    expected = torch.autograd.grad(-(best * logits.log_softmax(-1)).sum(), logits)[0]
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_without_choice_nothing_is_learned():
    logits = torch.zeros(4, dtype=F64, requires_grad=True)
    batch, _ = all_draws(logits, torch.zeros(4, dtype=F64).log_softmax(-1), 1)
    credited, _ = RAFT(beta=0.0).credit(batch, {})
    assert bool((RAFT(beta=0.0).loss(credited).terms[0].values == 0).all())


def test_a_fixed_target_and_the_kl_rest_at_their_mixture():
    """Cross-entropy to q plus c KL(ref || pi): the optimum is (q + c ref) / (1 + c)."""
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64)
    target = best_of_n(reference, REWARDS, 4)
    objective = RAFT(beta=0.5)

    def loss(theta):
        policy = theta.log_softmax(-1)
        statistic = objective.plan.statistics["forward_kl"]
        divergence = statistic(policy[None], reference.log()[None], torch.zeros(1))[0]
        return -(target * policy).sum() + objective.beta * divergence

    optimum = minimise(loss, torch.zeros(4, dtype=F64)).softmax(-1)
    torch.testing.assert_close(optimum, (target + 0.5 * reference) / 1.5, rtol=0, atol=1e-6)
