"""What every KL recipe optimises: enumerated expectations against autograd of the exact quantity."""

import math

import pytest
import torch
from torch import Tensor

from alignkit import kl
from alignkit.oracles.gradients import (
    Population,
    Tree,
    expected_gradient,
    gradient,
    regularised_value,
    sequence_kl,
    token_kl,
)

EXACT = {"atol": 1e-10, "rtol": 0.0}
BANDIT = Tree.build(5, 1)
TREES = {"bandit": BANDIT, "tree": Tree.build(3, 3)}


def tables(tree: Tree, n: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tree.states, tree.vocab, dtype=torch.float64, generator=generator)
        for _ in range(n)
    ]


def differs(found: Tensor, *others: Tensor) -> bool:
    return all((found - other).abs().max() > 1e-3 for other in others)


# ---------------------------------------------------------------- the oracle itself


def test_a_tree_is_a_distribution_over_all_responses():
    tree = TREES["tree"]
    assert len(tree.tokens) == 1 + 2 + 4 * 3  # ended after 1, after 2, three tokens
    assert tree.mask.sum(-1).tolist().count(3) == 12
    assert len({tuple(row[m].tolist()) for row, m in zip(tree.tokens, tree.mask)}) == 15
    (theta,) = tables(tree, 1)
    assert tree.sequence_logps(theta).exp().sum().item() == pytest.approx(1, abs=1e-14)


def test_the_exact_gradient_is_the_policy_gradient_theorem():
    theta, reference = tables(BANDIT, 2)
    reward = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], dtype=torch.float64)
    found = gradient(lambda t: regularised_value(BANDIT, t, reward, reference, 0.3), theta)
    p = theta[0].softmax(-1)
    gain = reward - 0.3 * (p.log() - reference[0].log_softmax(-1))
    torch.testing.assert_close(found[0], p * (gain - (p * gain).sum()), **EXACT)


def test_sequence_kl_is_the_sum_of_per_prefix_kls():
    tree = TREES["tree"]
    theta, reference = tables(tree, 2)
    torch.testing.assert_close(
        token_kl(tree, theta, reference), sequence_kl(tree, theta, reference), **EXACT
    )


def test_a_population_has_the_frequencies_of_its_policy():
    for tree in (None, TREES["tree"]):
        population = Population.build(tree)
        first, second = population.rows[0::2], population.rows[1::2]
        p = population.tree.sequence_logps(population.theta).exp()
        frequency = torch.zeros(len(p), len(p), dtype=torch.float64).index_put_(
            (first, second), torch.ones(len(first), dtype=torch.float64), accumulate=True
        )
        torch.testing.assert_close(frequency / len(first), p.outer(p), **EXACT)


# ---------------------------------------------------------------- KL recipes: the two tables


def kl_setting(shape: str):
    tree = TREES[shape]
    theta, reference, behavior = tables(tree, 3, seed=1)
    reverse = gradient(lambda t: sequence_kl(tree, t, reference), theta)
    forward = gradient(lambda t: sequence_kl(tree, t, reference, "forward"), theta)

    def recipe(loss, sampler: Tensor) -> Tensor:
        """Expected gradient of loss(log pi, log ratio, log importance) over responses from
        `sampler`.
        """
        log_sampler = tree.sequence_logps(sampler)

        def losses(t):
            logps = tree.sequence_logps(t)
            return loss(logps, logps - tree.sequence_logps(reference), logps - log_sampler)

        return expected_gradient(losses, theta, log_sampler.exp())

    return theta, reference, behavior, reverse, forward, recipe


RIGHT = {  # recipe: (loss of (log pi, a, log w), which gradient)
    "k1 in the loss": (lambda lp, a, w: kl.k1(a), "zero"),
    "k2 in the loss": (lambda lp, a, w: kl.k2(a), "reverse"),
    "k3 in the loss": (lambda lp, a, w: kl.k3(a), "forward"),
    "k1 in the reward": (lambda lp, a, w: kl.k1(a).detach() * lp, "reverse"),
    "k3 in the reward": (lambda lp, a, w: kl.k3(a).detach() * lp, "difference"),
    "w k1": (lambda lp, a, w: kl.k1_weighted(a, w), "reverse"),
    "w k3": (lambda lp, a, w: kl.k3_weighted(a, w), "reverse"),
    "straight-through k3": (lambda lp, a, w: kl.straight_through(a), "reverse"),
    "straight-through k1": (lambda lp, a, w: kl.straight_through(a, kl.k1), "reverse"),
}
OFF_POLICY = {
    "w k1": (lambda lp, a, w: kl.k1_weighted(a, w), "reverse"),
    "w k3": (lambda lp, a, w: kl.k3_weighted(a, w), "reverse"),
    "SG(w) k2": (lambda lp, a, w: kl.k2_weighted(a, w), "reverse"),
    "SG(w) k3": (lambda lp, a, w: kl.k3_stopped(a, w), "forward"),
    "SG(w) k1": (lambda lp, a, w: w.exp().detach() * kl.k1(a), "zero"),
    "k1 in the reward, weighted score": (
        lambda lp, a, w: (w.exp() * kl.k1(a)).detach() * lp,
        "reverse",
    ),
}


@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("name", RIGHT)
def test_on_policy_recipes(shape, name):
    theta, _, _, reverse, forward, recipe = kl_setting(shape)
    loss, which = RIGHT[name]
    wanted = {
        "zero": 0 * reverse,
        "reverse": reverse,
        "forward": forward,
        "difference": reverse - forward,
    }[which]
    torch.testing.assert_close(recipe(loss, theta), wanted, **EXACT)
    assert differs(reverse, forward, 0 * reverse, reverse - forward)


@pytest.mark.parametrize("shape", TREES)
def test_on_policy_recipes_that_are_wrong(shape):
    theta, _, _, reverse, forward, recipe = kl_setting(shape)
    # k2 in the reward
    assert differs(recipe(lambda lp, a, w: kl.k2(a).detach() * lp, theta), reverse, forward)
    # w k2, gradient through w
    assert differs(recipe(lambda lp, a, w: w.exp() * kl.k2(a), theta), reverse, forward)


@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("name", OFF_POLICY)
def test_off_policy_recipes(shape, name):
    _, _, behavior, reverse, forward, recipe = kl_setting(shape)
    loss, which = OFF_POLICY[name]
    wanted = {"zero": 0 * reverse, "reverse": reverse, "forward": forward}[which]
    torch.testing.assert_close(recipe(loss, behavior), wanted, **EXACT)


@pytest.mark.parametrize("shape", TREES)
def test_off_policy_recipes_that_are_wrong(shape):
    _, _, behavior, reverse, forward, recipe = kl_setting(shape)
    for loss in (kl.k1, kl.k2, kl.k3, kl.straight_through):
        assert differs(recipe(lambda lp, a, w, loss=loss: loss(a), behavior), reverse, forward)


@pytest.mark.parametrize("shape", TREES)
def test_forward_k3_on_samples_of_the_reference_needs_no_weight(shape):
    _, reference, _, _, forward, recipe = kl_setting(shape)
    torch.testing.assert_close(
        recipe(lambda lp, a, w: kl.k3_forward(a), reference), forward, **EXACT
    )


def test_full_vocabulary_kl_is_exact_for_one_step():
    theta, reference, *_ = kl_setting("bandit")
    for direction in ("reverse", "forward"):
        wanted = gradient(lambda t: sequence_kl(BANDIT, t, reference, direction), theta)  # noqa: B023

        def exact_kl(t, direction=direction):
            return kl.exact(BANDIT.logprobs(t), BANDIT.logprobs(reference), direction)[0, 0]

        exact = gradient(exact_kl, theta)
        torch.testing.assert_close(exact, wanted, **EXACT)


@pytest.mark.parametrize("log_z", [-0.7, 0.9])
def test_unnormalised_and_normalised_kls_have_one_gradient(log_z):
    theta, reference, *_ = kl_setting("bandit")
    q = BANDIT.sequence_logps(reference) + log_z  # a measure of mass Z

    def ukl(first, second):  # integral of P log(P/Q) + |Q| - |P|
        return (first.exp() * (first - second)).sum() + second.exp().sum() - first.exp().sum()

    for direction in ("reverse", "forward"):
        scale = 1.0 if direction == "reverse" else math.exp(log_z)
        wanted = scale * gradient(lambda t: sequence_kl(BANDIT, t, reference, direction), theta)  # noqa: B023
        pair = (
            (lambda t: (BANDIT.sequence_logps(t), q))
            if direction == "reverse"
            else (lambda t: (q, BANDIT.sequence_logps(t)))
        )
        torch.testing.assert_close(gradient(lambda t: ukl(*pair(t)), theta), wanted, **EXACT)  # noqa: B023


# ---------------------------------------------------------------- sequences: partial and full
# gradients


def token_setting():
    tree = TREES["tree"]
    theta, reference = tables(tree, 2, seed=2)
    full = gradient(lambda t: sequence_kl(tree, t, reference), theta)
    partial = gradient(lambda t: token_kl(tree, t, reference), theta)
    p = tree.sequence_logps(theta).exp()
    return tree, theta, reference, full, partial, lambda losses: expected_gradient(losses, theta, p)


def to_go(values: Tensor) -> Tensor:
    return values.flip(-1).cumsum(-1).flip(-1)


def test_sequence_forms_with_the_full_gradient():
    tree, theta, reference, full, partial, mean = token_setting()
    fixed = tree.logps(theta)

    def ratio(t):
        return tree.logps(t) - tree.logps(reference)

    def token_exact(t):
        return kl.exact(tree.logprobs(t), tree.logprobs(reference)) * tree.mask

    def rao_blackwell(t):
        later = (to_go(token_exact(t)) - token_exact(t)).detach()
        return (token_exact(t) + later * tree.logps(t)).sum(-1)

    forms = {
        "k1 in the reward, reward-to-go": lambda t: (to_go(ratio(t)).detach() * tree.logps(t)).sum(
            -1
        ),
        "k1 in the reward, whole sequence": lambda t: (
            ratio(t).sum(-1).detach() * tree.sequence_logps(t)
        ),
        "sequence k2 in the loss": lambda t: kl.k2(ratio(t).sum(-1)),
        "sequence w k3": lambda t: kl.k3_weighted(
            ratio(t).sum(-1), tree.sequence_logps(t) - fixed.sum(-1)
        ),
        "Rao-Blackwell": rao_blackwell,
    }
    for name, form in forms.items():
        torch.testing.assert_close(mean(form), full, **EXACT, msg=name)
    assert differs(full, partial)


def test_per_token_forms_share_the_partial_gradient():
    tree, theta, reference, _, partial, mean = token_setting()
    fixed = tree.logps(theta)

    def ratio(t):
        return tree.logps(t) - tree.logps(reference)

    forms = {
        "token k2": lambda t: kl.k2(ratio(t)).sum(-1),
        "token w k3": lambda t: kl.k3_weighted(ratio(t), tree.logps(t) - fixed).sum(-1),
        "token exact": lambda t: (
            kl.exact(tree.logprobs(t), tree.logprobs(reference)) * tree.mask
        ).sum(-1),
    }
    for name, form in forms.items():
        torch.testing.assert_close(mean(form), partial, **EXACT, msg=name)


def test_token_k3_and_sequence_k3_are_both_unbiased_and_not_the_same():
    tree, theta, reference, *_ = token_setting()
    p = tree.sequence_logps(theta).exp()
    ratio = tree.logps(theta) - tree.logps(reference)
    by_token, by_sequence = kl.k3(ratio).sum(-1), kl.k3(ratio.sum(-1))
    wanted = sequence_kl(tree, theta, reference)
    torch.testing.assert_close((p * by_token).sum(), wanted, **EXACT)
    torch.testing.assert_close((p * by_sequence).sum(), wanted, **EXACT)
    assert (p * (by_token - wanted) ** 2).sum() < (p * (by_sequence - wanted) ** 2).sum()
