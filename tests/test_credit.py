"""Credit assignment against naive double sums, closed forms and invariances."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit import credit
from alignkit.errors import ConfigError, ShapeError

F64 = torch.float64


def naive_gae(rewards, values, gamma, lam):
    """Equation 16 of the paper as a double sum over one unmasked row."""
    n = len(rewards)
    after = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3), st.booleans()), min_size=1, max_size=8),
    st.floats(0.1, 1),
    st.floats(0, 1),
)
def test_gae_steps_over_masked_tokens(steps, gamma, lam):
    rewards, values, mask = (torch.tensor([column]) for column in zip(*steps))
    rewards, values = rewards.double(), values.double()
    poison = torch.where(mask, 0.0, torch.nan)
    advantages, returns = credit.gae(rewards + poison, values + poison, mask, gamma=gamma, lam=lam)
    kept_rewards, kept_values = rewards[mask].tolist(), values[mask].tolist()
    expected = naive_gae(kept_rewards, kept_values, gamma, lam)
    assert advantages[mask].tolist() == pytest.approx(expected, abs=1e-12)
    assert returns[mask].tolist() == pytest.approx(
        [a + v for a, v in zip(expected, kept_values)], abs=1e-12
    )
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_gae_hand_written():
    rewards, values = (
        torch.tensor([[1.0, 0.0, 2.0]], dtype=F64),
        torch.tensor([[0.5, 1.0, -1.0]], dtype=F64),
    )
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = credit.gae(rewards, values, mask, gamma=0.5, lam=0.5)
    # deltas: 1 + 0.5 - 0.5 = 1; 0 - 0.5 - 1 = -1.5; 2 + 1 = 3
    assert advantages.tolist() == [[1 + 0.25 * (-1.5 + 0.25 * 3), -1.5 + 0.25 * 3, 3.0]]
    assert returns.tolist() == [[1.3125, 0.25, 2.0]]


def test_gae_with_gamma_and_lambda_one_is_reward_to_go_minus_value():
    rewards, values = torch.randn(4, 6, dtype=F64), torch.randn(4, 6, dtype=F64)
    mask = torch.arange(6) < torch.tensor([6, 1, 0, 4])[:, None]
    advantages, returns = credit.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = credit.reward_to_go(rewards, mask)
    assert torch.allclose(returns, to_go, atol=1e-14)
    assert torch.allclose(advantages, torch.where(mask, to_go - values, 0.0), atol=1e-14)


def test_gae_carries_no_gradient_and_names_wrong_shapes():
    values = torch.randn(1, 2, requires_grad=True)
    advantages, _ = credit.gae(torch.randn(1, 2), values, torch.ones(1, 2, dtype=torch.bool))
    assert not advantages.requires_grad
    with pytest.raises(ShapeError, match=r"rewards \[1, 3\]"):
        credit.gae(torch.randn(1, 3), values, torch.ones(1, 2, dtype=torch.bool))


def test_whitening_uses_all_unmasked_entries_of_the_global_batch():
    values = torch.randn(5, 4, dtype=F64) * 3 + 7
    mask = torch.rand(5, 4) > 0.4
    poisoned = torch.where(mask, values, torch.nan)
    white = credit.whiten(poisoned, mask, eps=0.0)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-14)
    assert white[mask].var(correction=0).item() == pytest.approx(1, abs=1e-13)
    assert (white[~mask] == 0).all()
    kept = credit.whiten(poisoned, mask, shift_mean=False, eps=0.0)
    assert kept[mask].mean().item() == pytest.approx(values[mask].mean().item(), abs=1e-13)


def test_whitening_one_or_no_entry_is_zero_not_nan():
    mask = torch.tensor([[True, False]])
    assert credit.whiten(torch.tensor([[3.0, 4.0]]), mask).tolist() == [[0.0, 0.0]]
    assert credit.whiten(
        torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2, dtype=torch.bool)
    ).tolist() == [[0.0, 0.0]]


SCORES = torch.tensor([1.0, 2.0, 6.0, 5.0, 4.0, 4.0], dtype=F64)
GROUPS = torch.tensor([7, 7, 7, 3, 9, 9])  # a group of three, a single one, a constant pair


def test_group_baselines_by_hand():
    assert credit.group_baseline(SCORES, GROUPS).tolist() == [3, 3, 3, 5, 4, 4]
    assert credit.group_baseline(SCORES, GROUPS, kind="leave_one_out").tolist() == [
        4,
        3.5,
        1.5,
        5,
        4,
        4,
    ]
    assert credit.group_baseline(SCORES, GROUPS, kind="none").tolist() == [0] * 6


def test_group_baselines_do_not_depend_on_order():
    order = torch.tensor([4, 0, 3, 2, 5, 1])
    for kind in ("mean", "leave_one_out"):
        shuffled = credit.group_baseline(SCORES[order], GROUPS[order], kind=kind)
        assert torch.equal(shuffled, credit.group_baseline(SCORES, GROUPS, kind=kind)[order])


def test_group_baseline_per_position_is_the_baseline_of_each_column():
    scores = torch.randn(6, 3, dtype=F64)
    found = credit.group_baseline(scores, GROUPS, kind="leave_one_out")
    for t in range(3):
        assert torch.equal(
            found[:, t], credit.group_baseline(scores[:, t], GROUPS, kind="leave_one_out")
        )


def test_leave_one_out_is_the_mean_baseline_scaled():
    plain = credit.group_advantages(SCORES[:3], GROUPS[:3])
    left_out = credit.group_advantages(SCORES[:3], GROUPS[:3], kind="leave_one_out")
    assert torch.allclose(left_out, plain * 3 / 2, atol=1e-14)


def test_group_standard_deviation_is_the_sample_one():
    scaled = credit.group_advantages(SCORES[:3], GROUPS[:3], scale=True, eps=0.0)
    assert torch.allclose(scaled, (SCORES[:3] - 3) / SCORES[:3].std(), atol=1e-14)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("kind", ["mean", "leave_one_out"])
def test_constant_groups_contribute_exactly_nothing(kind, scale):
    scores = torch.tensor([0.1] * 7 + [0.3, 0.2])  # the mean of seven 0.1 is not 0.1 in float32
    groups = torch.tensor([0] * 7 + [1, 1])
    assert credit.constant_groups(scores, groups).tolist() == [True] * 7 + [False] * 2
    advantages = credit.group_advantages(scores, groups, kind=kind, scale=scale)
    assert advantages[:7].tolist() == [0.0] * 7
    assert (advantages[7:] != 0).all()


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("kind", ["mean", "leave_one_out"])
def test_a_completion_alone_in_its_group_has_no_advantage(kind, scale):
    scores = torch.tensor([57.0, 1.0, 2.0], dtype=F64)
    groups = torch.tensor([0, 1, 1])
    advantages = credit.group_advantages(scores, groups, kind=kind, scale=scale)
    assert advantages[0] == 0
    assert advantages[1] == -advantages[2] != 0
    assert credit.constant_groups(scores, groups).tolist() == [True, False, False]


CONSTANTS = [0.1, 3.3, 100.7, 12345.678, -1e9, 3e19, 1e99]


@pytest.mark.parametrize("value", CONSTANTS)
@pytest.mark.parametrize("n", [2, 3, 7, 12])
def test_equal_rewards_are_no_difference_however_large(value, n):
    scores = torch.full((n,), value, dtype=F64)
    groups = torch.zeros(n, dtype=torch.long)
    for kind in ("mean", "leave_one_out"):
        for scale in (False, True):
            advantages = credit.group_advantages(scores, groups, kind=kind, scale=scale)
            assert (advantages == 0).all()

    # the reward still to come on every token of completions of different lengths
    mask = torch.arange(5) < torch.arange(n)[:, None] % 5 + 1
    shaped = credit.shaped_rewards(scores, torch.zeros(n, 5), mask, beta=0.1)
    assert (credit.whiten(credit.reward_to_go(shaped, mask), mask) == 0).all()


def test_a_spread_that_rounding_explains_is_none():
    """One weighted sum of rewards, in two orders of its parts."""
    sums = torch.tensor([0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1], dtype=F64)
    assert sums[0] != sums[1]
    groups = torch.zeros(2, dtype=torch.long)
    assert (credit.group_advantages(sums, groups, scale=True) == 0).all()
    assert (credit.whiten(sums[:, None], torch.ones(2, 1, dtype=torch.bool)) == 0).all()


@pytest.mark.parametrize(
    ("scores", "gap"),
    [([1e9, 1e9 + 1], 1.0), ([1e13, 1e13 + 1], 1.0), ([3e19, 6e19], 3e19), ([1e99, 3e99], 2e99)],
)
def test_small_differences_and_large_rewards_keep_their_advantages(scores, gap):
    scores = torch.tensor(scores, dtype=F64)
    groups = torch.zeros(2, dtype=torch.long)
    plain = credit.group_advantages(scores, groups).tolist()
    assert plain == pytest.approx([-gap / 2, gap / 2], rel=1e-14)
    left_out = credit.group_advantages(scores, groups, kind="leave_one_out").tolist()
    assert left_out == pytest.approx([-gap, gap], rel=1e-14)

    # the sample standard deviation of two values is their distance over the square root of 2
    scaled = credit.group_advantages(scores, groups, scale=True, eps=0.0)
    assert scaled.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-12)
    white = credit.whiten(scores[:, None], torch.ones(2, 1, dtype=torch.bool))
    assert white[:, 0].tolist() == pytest.approx([-1, 1], rel=1e-7)


def test_group_functions_say_what_is_wrong():
    with pytest.raises(ConfigError, match=r"median.*leave_one_out"):
        credit.group_baseline(SCORES, GROUPS, kind="median")
    with pytest.raises(ShapeError, match=r"groups \[6\].*scores \[3\]"):
        credit.group_baseline(SCORES[:3], GROUPS)


def test_the_score_lands_on_the_last_unmasked_token():
    mask = torch.tensor([[True, True, False], [True, False, True], [False, False, False]])
    kl = torch.tensor([[0.5, -1.0, torch.nan], [1.0, torch.nan, 2.0], [torch.nan] * 3])
    shaped = credit.shaped_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask, beta=0.1)
    expected = [[-0.05, 10.1, 0.0], [-0.1, 0.0, 19.8], [0.0, 0.0, 0.0]]
    assert torch.allclose(shaped, torch.tensor(expected), atol=1e-6)
    with pytest.raises(ShapeError, match="one entry per row"):
        credit.shaped_rewards(torch.zeros(2), kl, mask, beta=0.1)


def test_adaptive_beta_moves_towards_the_target_and_is_bounded():
    beta = torch.tensor(0.2, dtype=F64)

    def step(kl):
        return credit.adapt_beta(
            beta, torch.tensor(kl, dtype=F64), target=6.0, horizon=10_000, samples=500
        ).item()

    assert step(6.0) == pytest.approx(0.2, abs=1e-15)
    assert step(6.6) == pytest.approx(0.2 * (1 + 0.1 * 0.05), abs=1e-15)
    assert step(600.0) == pytest.approx(0.2 * (1 + 0.2 * 0.05), abs=1e-15)
    assert step(-5.0) == pytest.approx(0.2 * (1 - 0.2 * 0.05), abs=1e-15)
