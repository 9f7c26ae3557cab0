"""Credit for turns and tokens: worked numbers, limits, and what must not matter."""

import pytest
import torch

from alignkit.credit import group_baseline
from alignkit.errors import ConfigError, ShapeError
from alignkit.losses import (
    entropic_value_loss,
    gigpo_advantages,
    ktae_values,
    value_loss,
)

NAN = float("nan")


def episode_rows(*rows):
    """Rows of (reward, turn, state) per token; turn -1 is a foreign token."""
    length = max(map(len, rows))
    rewards = torch.full((len(rows), length), NAN, dtype=torch.float64)
    turns = torch.full((len(rows), length), -1)
    states = torch.full((len(rows), length), 99)
    for i, row in enumerate(rows):
        for t, (reward, turn, state) in enumerate(row):
            turns[i, t] = turn
            if turn >= 0:
                rewards[i, t] = reward
                states[i, t] = state
    return rewards, turns >= 0, turns, states


def test_gigpo_worked_example():
    """Episodes s0, s1, s0 with reward 1 at the end, and s0, s2 with nothing; gamma 0.9."""
    rewards, mask, turns, states = episode_rows(
        [(0, 0, 0), (0, -1, 0), (0, 1, 1), (0, 2, 0), (1, 2, 0)],
        [(0, 0, 0), (0, 1, 2)],
    )
    advantages = gigpo_advantages(
        rewards, mask, turns, states, torch.tensor([7, 3]), torch.tensor([0, 0]), gamma=0.9
    )
    expected = torch.zeros(2, 5, dtype=torch.float64)
    expected[0] = torch.tensor([0.706667, 0.0, 0.5, 0.896667, 0.896667])
    expected[1, :2] = torch.tensor([-1.103333, -0.5])
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-6)


def test_gigpo_without_the_step_part_is_the_group_baseline():
    rewards, mask, turns, states = episode_rows(
        [(1, 0, 0)], [(4, 0, 1)], [(0.5, 0, 2)], [(3, 0, 3)]
    )
    groups = torch.tensor([0, 0, 0, 1])
    advantages = gigpo_advantages(rewards, mask, turns, states, torch.arange(4), groups, omega=0.0)
    scores = rewards[:, 0]
    expected = scores - group_baseline(scores, groups)
    expected[3] = 0.0  # a group of one says nothing
    torch.testing.assert_close(advantages[:, 0], expected)


@pytest.mark.parametrize("normalise", [False, True])
def test_gigpo_of_one_turn_episodes_is_one_plus_omega_times_the_episode_part(normalise):
    rewards, mask, turns, states = episode_rows([(1, 0, 5)], [(4, 0, 5)], [(0.5, 0, 5)])
    groups = torch.zeros(3, dtype=torch.int64)
    options = {"normalise": normalise}
    episode = gigpo_advantages(
        rewards, mask, turns, states, torch.arange(3), groups, omega=0.0, **options
    )
    both = gigpo_advantages(
        rewards, mask, turns, states, torch.arange(3), groups, omega=0.7, **options
    )
    torch.testing.assert_close(both, 1.7 * episode, rtol=0, atol=1e-12)


@pytest.mark.parametrize("normalise", [False, True])
def test_gigpo_of_equal_values_is_exactly_zero(normalise):
    rewards, mask, turns, states = episode_rows([(0.1, 0, 5)], [(0.1, 0, 5)], [(0.1, 0, 5)])
    advantages = gigpo_advantages(
        rewards, mask, turns, states, torch.arange(3), torch.zeros(3, dtype=torch.int64),
        normalise=normalise,
    )  # fmt: skip
    assert torch.equal(advantages, torch.zeros_like(advantages))


def test_gigpo_over_several_rows_of_an_episode_is_that_of_one_row():
    """A rewritten prompt splits an episode; each episode still counts once."""
    whole = episode_rows([(0, 0, 0), (2, 1, 1)], [(1, 0, 0), (0, 1, 3)])
    split = episode_rows([(2, 1, 1)], [(1, 0, 0), (0, 1, 3)], [(0, 0, 0)])
    one = gigpo_advantages(*whole, torch.tensor([0, 1]), torch.tensor([0, 0]))
    several = gigpo_advantages(*split, torch.tensor([0, 1, 0]), torch.tensor([0, 0, 0]))
    assert several[0, 0] == one[0, 1]
    assert several[2, 0] == one[0, 0]
    torch.testing.assert_close(several[1], one[1])


def test_gigpo_refuses_what_does_not_fit():
    rewards, mask, turns, states = episode_rows([(1, 0, 5)])
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ConfigError, match="gamma"):
        gigpo_advantages(rewards, mask, turns, states, one, one, gamma=1.5)
    with pytest.raises(ConfigError, match="omega"):
        gigpo_advantages(rewards, mask, turns, states, one, one, omega=-1.0)
    with pytest.raises(ShapeError):
        gigpo_advantages(rewards, mask, turns, states, torch.zeros(2).long(), one.repeat(2))


def ktae_case(correct_counts, wrong_counts, length):
    """Completions of 10 tokens in which token 1 stands as often as the counts say."""
    rows = []
    for count in (*correct_counts, *wrong_counts):
        rows.append([1] * count + [5 + len(rows)] * (length - count))
    correct = [True] * len(correct_counts) + [False] * len(wrong_counts)
    ids = torch.tensor(rows)
    return ids, torch.ones_like(ids, dtype=torch.bool), torch.tensor(correct)


def test_ktae_worked_numbers():
    """(3, 1; 1, 3), 6 of 40 and 2 of 40 tokens: 0.405558, and its negative with sides swapped."""
    ids, mask, correct = ktae_case([2, 2, 2, 0], [2, 0, 0, 0], 10)
    groups = torch.zeros(8, dtype=torch.int64)
    values = ktae_values(ids, mask, correct, groups)
    assert float(values[0, 0]) == pytest.approx(0.405558, abs=5e-7)
    assert bool((values[ids == 1] == values[0, 0]).all())
    swapped = ktae_values(ids, mask, ~correct, groups)
    torch.testing.assert_close(swapped, -values, rtol=0, atol=1e-12)


def test_ktae_length_prior_turns_the_sign_of_the_longer_side():
    """The same table and frequency 0.1 on both sides, 60 tokens against 20."""
    rows = [[1, 1, *[9] * 13]] * 3 + [[8] * 15] + [[1, 1, *[7] * 3]] + [[6] * 5] * 3
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[t < len(row) for t in range(length)] for row in rows])
    correct = torch.tensor([True] * 4 + [False] * 4)
    groups = torch.zeros(8, dtype=torch.int64)
    plain = ktae_values(ids, mask, correct, groups)[0, 0]
    published = ktae_values(ids, mask, correct, groups, length_prior=0.5)[0, 0]
    assert float(plain) > 0
    assert float(published) == pytest.approx(-0.0688, abs=5e-5)


def test_ktae_is_zero_where_a_token_says_nothing():
    everywhere = torch.tensor([[1, 2], [1, 3], [1, 4], [1, 5]])
    mask = torch.ones_like(everywhere, dtype=torch.bool)
    correct = torch.tensor([True, True, False, False])
    groups = torch.zeros(4, dtype=torch.int64)
    assert bool((ktae_values(everywhere, mask, correct, groups)[:, 0] == 0).all())
    one_sided = ktae_values(everywhere, mask, torch.ones(4, dtype=torch.bool), groups)
    assert torch.equal(one_sided, torch.zeros_like(one_sided))


def test_ktae_reads_own_tokens_of_its_group_alone():
    ids, mask, correct = ktae_case([2, 2, 2, 0], [2, 0, 0, 0], 10)
    groups = torch.zeros(8, dtype=torch.int64)
    alone = ktae_values(ids, mask, correct, groups)
    foreign = torch.cat([ids, torch.ones(8, 3, dtype=torch.int64)], dim=1)
    wider = torch.cat([mask, torch.zeros(8, 3, dtype=torch.bool)], dim=1)
    with_foreign = ktae_values(foreign, wider, correct, groups)
    torch.testing.assert_close(with_foreign[:, :10], alone, rtol=0, atol=0)
    assert bool((with_foreign[:, 10:] == 0).all())

    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    two = ktae_values(
        torch.cat([ids, ids])[order],
        torch.cat([mask, mask])[order],
        torch.cat([correct, ~correct])[order],
        torch.cat([groups, groups + 4])[order],
    )
    torch.testing.assert_close(two, torch.cat([alone, -alone])[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("risk", [0.5, -2.0])
def test_entropic_value_is_the_certainty_equivalent(risk):
    returns = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    value = -(torch.exp(-risk * returns).mean()).log() / risk
    leaf = value.clone().requires_grad_()
    entropic_value_loss(leaf.expand(3), returns, risk=risk).mean().backward()
    assert abs(float(leaf.grad)) < 1e-14


@pytest.mark.parametrize("risk", [1e-12, -1e-6, 1e-3])
def test_entropic_loss_at_small_risk_is_half_the_squared_error(risk):
    values = torch.tensor([[0.3, -4.0, 7.0]], requires_grad=True)
    returns = torch.tensor([[0.1, 2.0, -1.0]])
    small = entropic_value_loss(values, returns, risk=risk)
    plain = value_loss(values, torch.zeros_like(values), returns, clip=None)
    torch.testing.assert_close(small, plain, rtol=10 * abs(risk) + 1e-6, atol=0)
    gradient = torch.autograd.grad(small.sum(), values)[0]
    torch.testing.assert_close(
        gradient, (values - returns).detach(), rtol=10 * abs(risk) + 1e-6, atol=0
    )


def test_entropic_loss_is_its_formula_on_both_sides_of_the_series():
    gap = torch.linspace(-4, 4, 101, dtype=torch.float64)
    for risk in (0.7, -1.3):
        loss = entropic_value_loss(torch.zeros(101, dtype=torch.float64), gap, risk=risk)
        x = risk * gap
        torch.testing.assert_close(loss, (torch.exp(-x) + x - 1) / risk**2, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropic_loss_far_away_is_finite_and_pulls_the_right_way(dtype):
    values = torch.tensor([-1e4, 1e4, -50.0, 50.0], dtype=dtype, requires_grad=True)
    loss = entropic_value_loss(values, torch.zeros_like(values), risk=3.0)
    gradient = torch.autograd.grad(loss.sum(), values)[0]
    assert bool(loss.isfinite().all())
    assert torch.equal(gradient.sign(), values.detach().sign())
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("risk", [0.0, NAN, float("inf")])
def test_entropic_loss_refuses_a_risk_that_is_none(risk):
    with pytest.raises(ConfigError, match="risk"):
        entropic_value_loss(torch.zeros(1), torch.zeros(1), risk=risk)
