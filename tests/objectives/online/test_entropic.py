"""Entropic risk: gradients of the utility by enumeration, limits, and the optimum with a KL."""

from dataclasses import dataclass, replace

import pytest
import torch

from alignkit.batches import RolloutBatch
from alignkit.credit import (
    certainty_equivalent,
    entropic_advantages,
    entropic_gain,
    gae,
    group_advantages,
)
from alignkit.errors import ConfigError
from alignkit.losses import entropic_value_loss
from alignkit.objectives.entropic import entropic_optimum
from alignkit.objectives.online.gigpo import GiGPO
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.online.kl_ppo import KLPPO
from alignkit.objectives.online.rloo import RLOO
from alignkit.oracles.gradients import (
    Population,
    expected_gradient,
    gradient,
    misalignment,
    sequence_kl,
)
from alignkit.oracles.optima import minimise

F64 = torch.float64
BETA = 0.3
RISKS = [1.3, -0.8]
SCORES = torch.tensor([0.2, -0.7, 1.5, 0.9, 0.0, -1.2, 0.4, 2.0, -0.3], dtype=F64)


def utility(logps, rewards, risk):
    """The certainty equivalent of the rewards under these log-probs."""
    return -(logps - risk * rewards).logsumexp(-1) / risk


@pytest.mark.parametrize("risk", RISKS)
def test_the_gain_is_the_gradient_of_the_certainty_equivalent(risk):
    rewards = SCORES[:5]
    logits = torch.linspace(-1, 1, 5, dtype=F64)
    law = logits.log_softmax(-1)
    gain = entropic_gain(rewards - utility(law, rewards, risk), risk=risk)
    assert abs(float((law.exp() * gain).sum())) < 1e-15

    wanted = gradient(lambda t: utility(t.log_softmax(-1), rewards, risk), logits)
    delivered = expected_gradient(lambda t: gain * t.log_softmax(-1), logits, law.exp())
    torch.testing.assert_close(delivered, wanted, rtol=0, atol=1e-15)


def test_a_small_risk_is_the_mean():
    gains = torch.linspace(-3, 3, 13, dtype=F64)
    torch.testing.assert_close(entropic_gain(gains, risk=1e-9), gains, rtol=1e-8, atol=0)
    groups = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2])
    for kind in ("mean", "leave_one_out"):
        plain = group_advantages(SCORES, groups, kind=kind)
        small = group_advantages(SCORES, groups, kind=kind, risk=1e-8)
        torch.testing.assert_close(small, plain, rtol=0, atol=1e-6)


def test_the_soft_value_is_the_log_normaliser_of_the_tilted_optimum():
    """risk = -1 / beta, samples of the reference: V = beta log E exp(R / beta)."""
    reference = torch.linspace(-1, 1, len(SCORES), dtype=F64).log_softmax(-1)
    start = torch.zeros(1, dtype=F64)

    def loss(value):
        return (
            reference.exp() * entropic_value_loss(value.expand(9), SCORES, risk=-1 / BETA)
        ).sum()

    value = minimise(loss, start)
    wanted = BETA * (reference + SCORES / BETA).logsumexp(-1)
    assert float(value) == pytest.approx(float(wanted), abs=1e-7)


@pytest.mark.parametrize("risk", RISKS)
def test_group_gains_have_mean_zero_and_nothing_where_nothing_differs(risk):
    groups = torch.tensor([4, 4, 4, 4, 1, 1, 7])
    scores = torch.tensor([0.5, 1.0, -2.0, 0.1, 0.3, 0.3, 9.0], dtype=F64)
    gains = group_advantages(scores, groups, risk=risk)
    assert abs(float(gains[:4].sum())) < 1e-14
    assert gains[4:].tolist() == [0, 0, 0]
    others = certainty_equivalent(scores, groups, risk=risk, kind="leave_one_out")
    assert float(others[0]) == pytest.approx(
        float(-(-risk * scores[1:4]).exp().mean().log() / risk)
    )
    assert float(others[6]) == 9.0


def test_far_gains_are_finite():
    gains = torch.tensor([-1e4, 1e4], dtype=F64)
    for risk in (3.0, -3.0):
        worth = entropic_gain(gains, risk=risk)
        assert bool(worth.isfinite().all())
        assert worth.sign().tolist() == [-1, 1]


@pytest.mark.parametrize("risk", [0.0, float("nan"), float("inf")])
def test_a_risk_that_is_none_is_refused(risk):
    with pytest.raises(ConfigError, match="risk"):
        entropic_gain(SCORES, risk=risk)


def test_a_risk_without_a_baseline_is_refused():
    with pytest.raises(ConfigError, match="leave_one_out"):
        group_advantages(SCORES, torch.zeros(9).long(), kind="none", risk=1.0)


@dataclass(frozen=True)
class Exact(Population):
    """With values at the tokens that are given."""

    values: torch.Tensor | None = None  # [n, depth]

    def batch(self, objective, theta, scores) -> RolloutBatch:
        batch = super().batch(objective, theta, scores)
        extras = batch.tokens.extras | {"values": self.values[self.rows]}
        return replace(batch, tokens=replace(batch.tokens, extras=extras))


def exact_values(population, risk):
    """Certainty equivalents of the score before each of the two tokens, [9, 2]."""
    tree = population.tree
    logps = tree.logps(population.theta)
    first_symbol = tree.tokens[:, 0]
    after_first = torch.stack(
        [utility(logps[first_symbol == s, 1], SCORES[first_symbol == s], risk) for s in range(3)]
    )
    start = utility(logps.sum(-1), SCORES, risk)
    return torch.stack([start.expand(9), after_first[first_symbol]], 1)


@pytest.mark.parametrize("risk", RISKS)
def test_kl_ppo_follows_the_gradient_of_the_utility_minus_the_kl(risk):
    plain = Population.build(seed=3)
    population = Exact(**vars(plain), values=exact_values(plain, risk))
    objective = KLPPO(
        beta=BETA,
        risk=risk,
        whiten_advantages=False,
        value_weight=0.0,
        aggregation="sequence_sum",
    )

    def loss(theta):
        logps = plain.tree.sequence_logps(theta)
        divergence = sequence_kl(plain.tree, theta, plain.reference)
        return BETA * divergence - utility(logps, SCORES, risk)

    wanted = gradient(loss, plain.theta)
    delivered = population.delivered(objective, SCORES)
    assert (delivered - wanted).abs().max() < 1e-10
    without = population.delivered(objective.model_copy(update={"risk": 0.0}), SCORES)
    assert (without - wanted).abs().max() > 0.01

    # What the values say of later prefixes is a baseline and moves nothing.
    elsewhere = population.values.clone()
    elsewhere[:, 1] += plain.tree.tokens[:, 0] - 0.4
    moved = replace(population, values=elsewhere).delivered(objective, SCORES)
    assert (moved - wanted).abs().max() < 1e-10


def test_advantages_from_values_at_a_small_risk_are_those_of_gae():
    noise = torch.Generator().manual_seed(2)
    rewards, values = torch.randn(2, 3, 5, generator=noise, dtype=F64).unbind(0)
    mask = torch.rand(3, 5, generator=noise) < 0.7
    plain, returns = gae(rewards, values, mask, gamma=1.0, lam=0.8)
    small = entropic_advantages(rewards, values, returns, mask, risk=1e-8)
    torch.testing.assert_close(small, plain, rtol=0, atol=1e-6)
    nan = torch.where(mask, rewards, torch.nan), torch.where(mask, values, torch.nan)
    again = entropic_advantages(*nan, returns, mask, risk=1e-8)
    assert torch.equal(again, small)


@pytest.mark.parametrize("risk", RISKS)
def test_rloo_gives_the_direction_of_the_utilitys_gradient(risk):
    """Without a KL; its size is off, since a certainty equivalent of one other is none of all."""
    population = Population.build(seed=3)
    wanted = gradient(
        lambda theta: -utility(population.tree.sequence_logps(theta), SCORES, risk),
        population.theta,
    )
    delivered = population.delivered(RLOO(beta=1e-12, risk=risk), SCORES)
    assert misalignment(delivered, wanted) < 1e-9
    assert misalignment(population.delivered(RLOO(beta=1e-12), SCORES), wanted) > 0.05


def test_gigpo_takes_the_risk_of_episodes():
    population = Population.build(seed=3)
    options = {"beta": 0.0, "risk": 0.9, "scale_by_std": False}
    grpo = population.delivered(GRPO(**options), SCORES)
    gigpo = population.delivered(GiGPO(**options, omega=0.0), SCORES)
    torch.testing.assert_close(gigpo, grpo, rtol=0, atol=1e-12)


def test_a_risk_and_a_discount_are_refused():
    with pytest.raises(ValueError, match="gamma"):
        KLPPO(risk=1.0, gamma=0.9)
    with pytest.raises(ValueError, match="whiten_rewards"):
        KLPPO(risk=1.0, whiten_rewards=True)


@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_below_zero_is_the_largest_there_is(seed):
    noise = torch.Generator().manual_seed(seed)
    rewards, reference = torch.randn(2, 5, generator=noise, dtype=F64).unbind(0)
    reference = reference.log_softmax(-1)
    risk = -1.5

    def loss(theta):
        law = theta.log_softmax(-1)
        return BETA * (law.exp() * (law - reference)).sum() - utility(law, rewards, risk)

    optimum = entropic_optimum(rewards, reference, beta=BETA, risk=risk)
    assert gradient(loss, optimum).abs().max() < 1e-10
    for start in (reference, torch.zeros(5, dtype=F64), 3 * rewards):
        reached = minimise(loss, start)
        torch.testing.assert_close(reached.softmax(-1), optimum.exp(), rtol=0, atol=1e-6)
    mean = KLPPO(beta=BETA).optimum(rewards, reference)
    small = entropic_optimum(rewards, reference, beta=BETA, risk=-1e-7)
    torch.testing.assert_close(small, mean, rtol=0, atol=1e-5)
    assert KLPPO(beta=BETA, risk=2.0).optimum(rewards, reference) is None
