"""GiGPO and KTAE as objectives: what their credit makes of a rollout of episodes."""

import pytest
import torch

from alignkit.batches import RolloutBatch, TokenLogps
from alignkit.errors import ConfigError
from alignkit.objectives.online.dr_grpo import DrGRPO
from alignkit.objectives.online.gigpo import GiGPO
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.online.ktae import KTAE
from alignkit.objectives.token_credit import ktae_values


def rollout(turns, rewards, groups, **channels):
    turns = torch.tensor(turns)
    rewards = torch.tensor(rewards, dtype=torch.float64)
    mask = turns >= 0
    zeros = torch.zeros(mask.shape, dtype=torch.float64)
    tokens = TokenLogps(zeros, {"reference": zeros}, mask, zeros)
    return RolloutBatch(
        tokens, rewards.sum(-1), torch.tensor(groups), turns=turns, rewards=rewards, **channels
    )


def advantages(objective, batch):
    return objective.credit(batch, objective.init_state())[0].advantages


def worked():
    """Episodes s0, s1, s0 (reward 1 at the end) and s0, s2 (0), with foreign tokens between."""
    return rollout(
        [[0, -1, 1, 1, -1, 2], [0, 0, -1, 1, -1, -1]],
        [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]],
        [7, 7],
        states=torch.tensor([[10, 0, 11, 11, 0, 10], [10, 10, 0, 12, 0, 0]]),
    )


def test_gigpo_gives_the_worked_example_at_own_tokens():
    first, second = advantages(GiGPO(gamma=0.9), worked()).tolist()
    assert first == pytest.approx([0.706667, 0, 0.5, 0.5, 0, 0.896667], abs=1e-6)
    assert second == pytest.approx([-1.103333, -1.103333, 0, -0.5, 0, 0], abs=1e-6)


def test_without_the_comparison_of_turns_gigpo_is_grpo_on_episodes():
    plain = advantages(GRPO(scale_by_std=False), worked())
    assert torch.equal(advantages(GiGPO(omega=0), worked()), plain)
    assert torch.equal(plain, advantages(DrGRPO(), worked()))


def test_completions_of_one_turn_get_the_episode_part_twice():
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    zeros = torch.zeros(3, 3, dtype=torch.float64)
    scores = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    batch = RolloutBatch(TokenLogps(zeros, {}, mask, zeros), scores, torch.tensor([0, 0, 0]))
    both = advantages(GiGPO(omega=0.5), batch)
    episodes = advantages(GiGPO(omega=0), batch)
    assert torch.allclose(both, 1.5 * episodes, atol=1e-12, rtol=0)
    assert both[0, 0] == 0.75


def test_ktae_adds_the_tokens_values_but_none_at_the_end_of_a_turn():
    ids = torch.tensor([[5, 9, 3, 5, 9], [6, 9, 3, 6, 9], [6, 5, 9, 0, 0]])
    turns = [[0, 0, -1, 1, 1], [0, 0, -1, 1, 1], [0, 0, 0, -1, -1]]
    batch = rollout(turns, [[0, 0, 0, 0, 1.0], [0.0] * 5, [0.0] * 5], [4, 4, 4], ids=ids)
    values = ktae_values(ids, batch.tokens.mask, batch.scores > 0, batch.groups)
    extra = advantages(KTAE(token_weight=2.0), batch) - advantages(GRPO(), batch)
    assert values[0, 0] > 0 > values[1, 0]
    wanted = torch.tensor([[1, 0, 0, 1, 0], [1, 0, 0, 1, 0], [1, 1, 0, 0, 0]]) * 2.0 * values
    assert torch.allclose(extra, wanted, atol=1e-12, rtol=0)


def test_ktae_calls_correct_what_scores_above_the_threshold():
    ids = torch.tensor([[5, 9], [6, 9]])
    batch = rollout([[0, 0], [0, 0]], [[0, 0.6], [0, 0.4]], [1, 1], ids=ids)
    plain = advantages(GRPO(), batch)
    assert torch.equal(advantages(KTAE(), batch), plain)  # all are correct: no side to compare
    assert not torch.equal(advantages(KTAE(threshold=0.5), batch), plain)


def test_ktae_without_token_ids_is_refused():
    batch = rollout([[0, 0]], [[0, 1.0]], [0])
    with pytest.raises(ConfigError, match="no token ids"):
        advantages(KTAE(), batch)
