"""What RPG and the online objectives optimise, credit and reduction included: enumeration against
autograd of the exact J.
"""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from alignkit import GRPO, KLPPO, RLOO, RPG, kl
from alignkit.batches import LossTerms, Plan, RolloutBatch
from alignkit.losses import ppo_loss, rpg_loss
from alignkit.objectives.rollout_base import RolloutObjective
from alignkit.oracles.gradients import (
    Population,
    Tree,
    check_kl_gradient,
    expected_gradient,
    gradient,
    kl_misalignment,
    misalignment,
    regularised_value,
    token_kl,
)
from alignkit.policies.head import Head

EXACT = {"atol": 1e-10, "rtol": 0.0}
TREES = {"bandit": Tree.build(5, 1), "tree": Tree.build(3, 3)}


def tables(tree: Tree, n: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(tree.states, tree.vocab, dtype=torch.float64, generator=generator)
        for _ in range(n)
    ]


def differs(found: Tensor, *others: Tensor) -> bool:
    return all((found - other).abs().max() > 1e-3 for other in others)


# ---------------------------------------------------------------- RPG

DIVERGENCES = ("forward_kl", "reverse_kl", "forward_ukl", "reverse_ukl")


def rpg_value(tree, theta, reward, old, beta, divergence, mass):
    """Exact J = E[reward] - beta D(policy, mass * old)."""
    log_pi, log_old = tree.sequence_logps(theta), tree.sequence_logps(old) + math.log(mass)
    first, second = (log_old, log_pi) if divergence.startswith("forward") else (log_pi, log_old)
    penalty = (first.exp() * (first - second)).sum()
    if divergence.endswith("ukl"):
        penalty = penalty + second.exp().sum() - first.exp().sum()
    return (log_pi.exp() * reward).sum() - beta * penalty


@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("estimator", ["differentiable", "reinforce"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rpg_losses_have_gradient_minus_grad_j(shape, divergence, estimator):
    tree, beta = TREES[shape], 0.4
    for seed, mass, baseline in product((0, 1), (1.0, 0.6, 2.5), (0.0, 1.7)):
        if mass != 1 and not divergence.endswith("ukl"):
            continue
        theta, old = tables(tree, 2, seed)
        reward = torch.randn(
            len(tree.tokens), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        log_old = tree.sequence_logps(old) + math.log(mass)
        form = {"beta": beta, "divergence": divergence, "estimator": estimator, "mass": mass}
        found = expected_gradient(
            lambda t: rpg_loss(tree.sequence_logps(t), log_old, reward - baseline, **form),  # noqa: B023
            theta,
            tree.sequence_logps(old).exp(),
        )
        wanted = gradient(lambda t: -rpg_value(tree, t, reward, old, beta, divergence, mass), theta)  # noqa: B023
        torch.testing.assert_close(found, wanted, **EXACT)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rpg_token_ratios_are_not_the_theorem_off_policy(divergence):
    tree = TREES["tree"]
    theta, old = tables(tree, 2, seed=3)
    reward = torch.randn(
        len(tree.tokens), dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    spread = reward[:, None].expand_as(tree.mask)

    def losses(t):
        values = rpg_loss(tree.logps(t), tree.logps(old), spread, beta=0.4, divergence=divergence)
        return torch.where(tree.mask, values, 0.0).sum(-1)

    wanted = gradient(lambda t: -rpg_value(tree, t, reward, old, 0.4, divergence, 1.0), theta)
    assert differs(expected_gradient(losses, theta, tree.sequence_logps(old).exp()), wanted)


@pytest.mark.parametrize("estimator", ["differentiable", "reinforce"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rpg_clip_is_the_dual_clip_on_the_stopped_regularised_advantage(divergence, estimator):
    beta, clip = 0.3, {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(4000, dtype=torch.float64, generator=generator)
    policy = (old + torch.randn(4000, dtype=torch.float64, generator=generator)).requires_grad_()
    advantages = torch.randn(4000, dtype=torch.float64, generator=generator)
    w = (policy - old).exp().detach()
    inside = {
        "forward_kl": beta / w,
        "reverse_kl": -beta * (w.log() + 1),
        "forward_ukl": beta * (1 - w) / w,
    }
    regularised = advantages + inside.get(divergence, -beta * w.log())
    (wanted,) = torch.autograd.grad(ppo_loss(policy, old, regularised, **clip).sum(), policy)
    loss = rpg_loss(
        policy, old, advantages, beta=beta, divergence=divergence, estimator=estimator, **clip
    )
    (found,) = torch.autograd.grad(loss.sum(), policy)
    if estimator == "reinforce":
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    else:  # the differentiable form keeps its own gradient and is cut in the same places
        (whole,) = torch.autograd.grad(
            rpg_loss(
                policy, old, advantages, beta=beta, divergence=divergence, estimator=estimator
            ).sum(),
            policy,
        )
        torch.testing.assert_close(found, torch.where(wanted == 0, 0.0, whole), atol=1e-12, rtol=0)
    assert 200 < int((wanted == 0).sum()) < 3800


# ---------------------------------------------------------------- objectives, credit and reduction
# included

REWARD = torch.tensor(
    [1.0, -0.5, 0.3, 2.0, 0.0, -1.0, 0.7, 1.5, -0.2, 0.9, 1.1, -0.4, 0.6, 0.2, -0.8],
    dtype=torch.float64,
)
UNCLIPPED = {"clip_low": None, "clip_high": None}
EXACT_OBJECTIVES = {
    "kl_ppo": KLPPO(beta=0.3, whiten_advantages=False, aggregation="sequence_sum"),
    "kl_ppo constant": KLPPO(beta=0.3, whiten_advantages=False, aggregation="constant", length=1),
    "rpg": RPG(beta=0.3, aggregation="sequence_sum"),
    "rpg differentiable": RPG(beta=0.3, aggregation="sequence_sum", estimator="differentiable"),
    "rpg without baseline": RPG(beta=0.3, aggregation="sequence_sum", baseline="none"),
    "rloo": RLOO(beta=0.3),
}
PROPORTIONAL = {
    "kl_ppo": KLPPO(beta=0.3),
    "kl_ppo token mean": KLPPO(beta=0.3, whiten_advantages=False),
    "rpg token mean": RPG(beta=0.3),
}


@pytest.fixture(scope="module", params=["fixed length", "with end of text"])
def population(request):
    return Population.build(None if request.param == "fixed length" else TREES["tree"])


def wanted_gradient(population, reward):
    return gradient(
        lambda t: -regularised_value(population.tree, t, reward, population.reference, 0.3),
        population.theta,
    )


@pytest.mark.parametrize("name", EXACT_OBJECTIVES)
def test_first_step_is_minus_grad_j(population, name):
    reward = REWARD[: len(population.tree.tokens)]
    torch.testing.assert_close(
        population.delivered(EXACT_OBJECTIVES[name], reward),
        wanted_gradient(population, reward),
        **EXACT,
    )


class TemperedTree(Tree):
    """The head's log-probs at temperature 0.7 of logits theta."""

    def logprobs(self, theta: Tensor) -> Tensor:
        return Head(torch.nn.Identity(), temperature=0.7).logprobs(theta)[self.prefixes]


@pytest.mark.parametrize("name", EXACT_OBJECTIVES)
def test_at_another_temperature_it_is_the_tempered_policys_j(population, name):
    """Sampled, trained and anchored at 0.7: J is that of softmax(theta / 0.7), its gradient with
    respect to theta.
    """
    plain = population.tree
    tempered = replace(
        population, tree=TemperedTree(**vars(plain)), theta=0.7 * population.theta
    )  # which samples as the population does
    reward = REWARD[: len(plain.tokens)]
    reference = population.reference
    wanted = gradient(
        lambda t: -regularised_value(plain, t / 0.7, reward, reference / 0.7, 0.3), tempered.theta
    )
    found = tempered.delivered(EXACT_OBJECTIVES[name], reward)
    torch.testing.assert_close(found, wanted, **EXACT)

    # the anchor left at temperature 1 would be another objective
    other = gradient(
        lambda t: -regularised_value(plain, t / 0.7, reward, reference, 0.3), tempered.theta
    )
    assert differs(found, other)


@pytest.mark.parametrize("name", PROPORTIONAL)
def test_whitening_and_token_mean_only_rescale(population, name):
    reward = REWARD[: len(population.tree.tokens)]
    found = population.delivered(PROPORTIONAL[name], reward)
    wanted = wanted_gradient(population, reward)
    assert misalignment(found, wanted) < 1e-10
    assert (found - wanted).abs().max() > 1e-3


def test_what_bends_the_direction():
    """Lambda below 1 with inexact values, whitened rewards, partial credit; a wrong beta too, or
    this test sees nothing.
    """
    population = Population.build(TREES["tree"])
    reward = REWARD[: len(population.tree.tokens)]
    wanted = wanted_gradient(population, reward)
    for objective in (
        KLPPO(beta=0.3, lam=0.9),
        KLPPO(beta=0.3, whiten_rewards=True),
        KLPPO(beta=0.3, kl_credit="token"),
        RPG(beta=0.3, kl_credit="token"),
        RPG(beta=0.3, baseline="mean"),
        KLPPO(beta=0.35),
        GRPO(beta=0.3),
    ):
        assert misalignment(population.delivered(objective, reward), wanted) > 1e-3, objective


def test_partial_credit_delivers_the_partial_gradient(population):
    tree, reward = population.tree, REWARD[: len(population.tree.tokens)]
    wanted = gradient(
        lambda t: (
            0.3 * token_kl(tree, t, population.reference)
            - (tree.sequence_logps(t).exp() * reward).sum()
        ),
        population.theta,
    )
    for objective in (
        KLPPO(beta=0.3, kl_credit="token", whiten_advantages=False, aggregation="sequence_sum"),
        RPG(beta=0.3, kl_credit="token", aggregation="sequence_sum"),
    ):
        torch.testing.assert_close(population.delivered(objective, reward), wanted, **EXACT)


@pytest.mark.parametrize("estimator", ["differentiable", "reinforce"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rpg_with_the_sampler_as_anchor(population, divergence, estimator):
    """On-policy the KL has no gradient; after some updates the gradient is that of J with this
    divergence.
    """
    form = {"divergence": divergence, "estimator": estimator, "dual_clip": None, **UNCLIPPED}
    objective = RPG(beta=0.3, anchor="behavior", **form)
    reward = REWARD[: len(population.tree.tokens)]
    assert population.delivered(objective, 0 * reward).abs().max() < 1e-12
    moved = population.theta + 0.5 * population.reference
    wanted = gradient(
        lambda t: -rpg_value(population.tree, t, reward, population.theta, 0.3, divergence, 1.0),
        moved,
    )
    torch.testing.assert_close(population.delivered(objective, reward, at=moved), wanted, **EXACT)


def test_rloo_is_unbiased_after_updates(population):
    """The sequence ratio corrects the reward; the KL in the score stays that of the sampler (log
    old - log ref).
    """
    tree, reward = population.tree, REWARD[: len(population.tree.tokens)]
    moved = population.theta + 0.5 * population.reference
    score = reward - 0.3 * (
        tree.sequence_logps(population.theta) - tree.sequence_logps(population.reference)
    )
    wanted = gradient(lambda t: -(tree.sequence_logps(t).exp() * score).sum(), moved)
    torch.testing.assert_close(
        population.delivered(RLOO(beta=0.3, **UNCLIPPED), reward, at=moved), wanted, **EXACT
    )


def test_equal_scores_contribute_nothing_to_grpo(population):
    ones = torch.full((len(population.tree.tokens),), 0.1, dtype=torch.float64)
    assert (population.delivered(GRPO(beta=0.0), ones) == 0).all()
    assert population.delivered(GRPO(beta=0.0), REWARD[: len(ones)]).abs().max() > 1e-2


# ---------------------------------------------------------------- documented against delivered

CLAIMS = [
    *(
        KLPPO(kl_credit=credit, whiten_advantages=white)
        for credit in ("sequence", "token")
        for white in (True, False)
    ),
    *(
        RPG(kl_credit=credit, estimator=e)
        for credit in ("sequence", "token")
        for e in ("differentiable", "reinforce")
    ),
    *(GRPO(kl=name, scale_by_std=std) for name in kl.LOSS_ESTIMATORS for std in (True, False)),
    RLOO(),
]


@pytest.mark.parametrize("objective", CLAIMS, ids=lambda o: f"{type(o).__name__}-{o.kl_gradient}")
def test_documented_kl_gradients_are_delivered(objective):
    assert objective.kl_gradient is not None
    check_kl_gradient(objective)
    others = {
        name: off
        for name, off in kl_misalignment(objective).items()
        if name != " ".join(objective.kl_gradient)
    }
    assert min(others.values()) > 1e-2


class Mislabelled(GRPO):
    """GRPO as published, documented as the reverse KL."""

    @property
    def kl_gradient(self):
        return "token", "reverse"


class Noise(RolloutObjective):
    """k1 in the loss: a penalty whose value is the reverse KL and whose gradient is nothing."""

    @property
    def plan(self) -> Plan:
        return self.rollout_plan()

    @property
    def kl_gradient(self):
        return "token", "reverse"

    def credit(self, rollout, state):
        return replace(rollout, advantages=torch.zeros_like(rollout.tokens.policy)), state

    def loss(self, batch: RolloutBatch) -> LossTerms:
        return LossTerms([self.term("k1", kl.k1(batch.tokens.log_ratio), batch.tokens)])


def test_an_objective_that_delivers_another_gradient_than_it_documents_fails():
    with pytest.raises(
        AssertionError,
        match=r"Mislabelled documents .* token reverse .* nearest is the token forward KL",
    ):
        check_kl_gradient(Mislabelled(kl="k3"))
    check_kl_gradient(Mislabelled(kl="k2"))
    with pytest.raises(AssertionError, match="Noise documents"):
        check_kl_gradient(Noise())
