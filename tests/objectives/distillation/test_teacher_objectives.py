"""Objectives on a teacher and on targets: expected gradients by enumeration and what they end at."""

import pytest
import torch

from alignkit import FDPG, KDRL, OPD, PLD, Distill, MiniLLM, TrajectoryBalance
from alignkit.batches import SequenceBatch
from alignkit.oracles.gradients import (
    Population,
    gradient,
    regularised_value,
    sequence_kl,
    token_kl,
)
from alignkit.oracles.optima import minimise
from alignkit.policies.tabular import Tree
from alignkit.testing import check_objective

EXACT = {"rtol": 0, "atol": 1e-10}
SUM = {"aggregation": "sequence_sum"}
CLASSES = [PLD, OPD, KDRL, MiniLLM, TrajectoryBalance, FDPG]


@pytest.fixture(scope="module")
def population():
    return Population.build()


@pytest.mark.parametrize("objective", [o for cls in CLASSES for o in cls.examples()], ids=repr)
def test_every_setting_holds(objective):
    assert check_objective(objective)


def test_opd_is_the_partial_gradient_that_distill_has(population):
    nothing = torch.zeros(len(population.tree.tokens), dtype=torch.float64)
    wanted = gradient(
        lambda theta: token_kl(population.tree, theta, population.reference), population.theta
    )
    found = population.delivered(OPD(**SUM), nothing)
    torch.testing.assert_close(found, wanted, **EXACT)
    by_law = population.delivered(Distill(divergence="reverse_kl", share=1.0), nothing)
    torch.testing.assert_close(by_law * population.tree.tokens.shape[1], wanted, **EXACT)


@pytest.mark.parametrize("baseline", ["leave_one_out", "none"])
@pytest.mark.parametrize("single_step", [True, False])
def test_minillm_is_the_full_gradient(population, single_step, baseline):
    objective = MiniLLM(single_step=single_step, baseline=baseline, **SUM)
    wanted = gradient(
        lambda theta: sequence_kl(population.tree, theta, population.reference), population.theta
    )
    nothing = torch.zeros(len(population.tree.tokens), dtype=torch.float64)
    torch.testing.assert_close(population.delivered(objective, nothing), wanted, **EXACT)


def test_minillm_without_what_follows_is_the_partial_gradient(population):
    """gamma 0 leaves the exact KL of each token."""
    wanted = gradient(
        lambda theta: token_kl(population.tree, theta, population.reference), population.theta
    )
    nothing = torch.zeros(len(population.tree.tokens), dtype=torch.float64)
    found = population.delivered(MiniLLM(gamma=0.0, **SUM), nothing)
    torch.testing.assert_close(found, wanted, **EXACT)


def test_kdrl_climbs_the_reward_minus_the_kl_to_the_teacher():
    """One token each, where the partial gradient is the full one. The group's mean contains the
    completion itself, so that half of the reward's gradient is left in groups of two.
    """
    population = Population.build(Tree.build(6, 1, eos=False))
    scores = torch.linspace(-1, 2, 6, dtype=torch.float64)
    wanted = gradient(
        lambda theta: (
            -regularised_value(population.tree, theta, scores / 2, population.reference, 0.3)
        ),
        population.theta,
    )
    found = population.delivered(KDRL(kd_weight=0.3, scale_by_std=False), scores)
    torch.testing.assert_close(found, wanted, **EXACT)


def test_masked_completions_are_not_distilled(population):
    """With a score above 0 everywhere and all alike, nothing is left to learn."""
    ones = torch.ones(len(population.tree.tokens), dtype=torch.float64)
    assert population.delivered(KDRL(kd_weight=0.3, masking="response"), ones).abs().max() == 0
    assert population.delivered(KDRL(kd_weight=0.3), ones).abs().max() > 1e-3


def test_trajectory_balance_vanishes_at_the_tilted_optimum_and_climbs_towards_it(population):
    tree, beta = population.tree, 0.7
    scores = torch.linspace(-1, 1, len(tree.tokens), dtype=torch.float64)
    objective = TrajectoryBalance(beta=beta)
    best = tree.conditionals(objective.optimum(scores, tree.sequence_logps(population.reference)))
    (term,) = objective.loss(population.batch(objective, best, scores)).terms
    assert term.values.abs().max() < 1e-20

    # The gradient of the variance in groups of two is (K - 1) / K times 2 that of -J / beta.
    wanted = gradient(
        lambda theta: -regularised_value(tree, theta, scores, population.reference, beta) / beta,
        population.theta,
    )
    torch.testing.assert_close(population.delivered(objective, scores), wanted, **EXACT)


def test_fdpg_in_the_reverse_kl_climbs_the_reward_minus_the_kl(population):
    tree, beta = population.tree, 0.7
    scores = torch.linspace(-1, 1, len(tree.tokens), dtype=torch.float64)
    wanted = gradient(
        lambda theta: -regularised_value(tree, theta, scores, population.reference, beta) / beta,
        population.theta,
    )
    objective = FDPG(beta=beta, divergence="reverse_kl", cap=100.0)
    torch.testing.assert_close(population.delivered(objective, scores), wanted, **EXACT)


def test_pld_with_a_sure_teacher_is_the_likelihood():
    tree = Tree.build(4, 1, eos=False)
    sure = torch.full((1, 4), -torch.inf, dtype=torch.float64)
    sure[0, 2] = 0.0
    theta = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = tree.token_logps(theta, {"teacher": sure}, PLD().plan)
    (term,) = PLD().loss(SequenceBatch(tokens)).terms
    torch.testing.assert_close(term.values[2], -theta.log_softmax(-1)[0, 2:3], **EXACT)


def test_pld_with_the_teachers_first_token_as_label_keeps_its_order():
    tree = Tree.build(4, 1, eos=False)
    teacher = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()

    def loss(theta):
        tokens = tree.token_logps(theta, {"teacher": teacher}, PLD().plan)
        (term,) = PLD().loss(SequenceBatch(tokens)).terms
        return term.values[0].sum()

    # The last place is certain once the others are taken, so its weight moves nothing.
    found = minimise(lambda x: loss(x) + 1e-3 * (x**2).sum(), torch.zeros(1, 4).double())[0]
    assert bool((found.diff() < 0).all())
