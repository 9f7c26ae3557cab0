"""Credit of every online objective where rewards say nothing: groups of one, constants, large values.

Each case runs the objective's own `credit` and loss on a rollout whose log-probs are float32, as
they are in a run.
"""

from dataclasses import replace

import pytest
import torch

from alignkit import CISPO, DAPO, GRPO, GSPO, KLPPO, RLOO, RPG, DrGRPO, ReinforcePlusPlus
from alignkit.batches import RolloutBatch, TokenLogps

F64 = torch.float64
GROUPED = [
    GRPO(beta=0),
    GRPO(beta=0, scale_by_std=False),
    DAPO(),
    DAPO(scale_by_std=False, drop_constant=False),
    DrGRPO(length=4),
    RLOO(),
    GSPO(),
    CISPO(),
    RPG(anchor="behavior"),
    RPG(),
    RPG(baseline="mean", kl_credit="token"),
    ReinforcePlusPlus(baseline="group"),
]
WHITENED = [
    ReinforcePlusPlus(),
    KLPPO(),
    KLPPO(kl_credit="token", aggregation="sequence_mean"),
]


def named(objectives):
    labels = [f"{type(o).__name__}-{i}" for i, o in enumerate(objectives)]
    return pytest.mark.parametrize("objective", objectives, ids=labels)


def rollout(scores, groups) -> RolloutBatch:
    """Completions of 1 to 4 tokens by a policy that is still its own reference."""
    n = len(scores)
    mask = torch.arange(4) < torch.arange(n)[:, None] % 4 + 1
    logps = torch.where(mask, -torch.rand(n, 4, generator=torch.Generator().manual_seed(0)), 0.0)
    zeros = torch.zeros(n, 4)
    tokens = TokenLogps(logps, {"reference": logps}, mask, logps, {"kl": zeros, "values": zeros})
    return RolloutBatch(tokens, torch.tensor(scores, dtype=F64), torch.tensor(groups))


def advantages(objective, batch):
    return objective.credit(batch, objective.init_state())[0].advantages


def gradient(objective, batch):
    """Of the loss terms with respect to the policy's log-probs [N, T]."""
    credited, _ = objective.credit(batch, objective.init_state())
    policy = batch.tokens.policy.clone().requires_grad_()
    filled = replace(credited, tokens=replace(batch.tokens, policy=policy))
    terms = [t for t in objective.loss(filled).terms if t.name != "value"]
    sum(t.weight * t.values.sum() for t in terms).backward()
    return policy.grad


@named(GROUPED)
def test_one_scored_completion_teaches_nothing(objective):
    batch = rollout([57.0, 1.0, 2.0], [0, 1, 1])
    credit = advantages(objective, batch)
    assert (credit[0] == 0).all()
    assert (credit[1:].abs().sum(-1) > 0).all()
    assert (gradient(objective, batch)[0] == 0).all()


def test_dapo_counts_groups_of_one_among_those_without_a_difference():
    """Two groups of 1 and 2 tokens: the mean over 3 tokens becomes one over the other group's 2."""
    batch = rollout([57.0, 1.0, 2.0], [0, 1, 1])
    lengths = batch.tokens.lengths
    selected = advantages(DAPO(scale_by_std=False), batch)
    plain = advantages(DAPO(scale_by_std=False, drop_constant=False), batch)
    assert torch.allclose(selected, plain * lengths.sum() / lengths[1:].sum())


@pytest.mark.parametrize("value", [0.1, 3.3, 100.7, 12345.678, -1e9, 3e19])
@named(GROUPED + WHITENED)
def test_a_constant_reward_moves_nothing(objective, value):
    batch = rollout([value] * 8, [0, 0, 0, 0, 0, 0, 0, 0])
    assert (advantages(objective, batch) == 0).all()
    assert (gradient(objective, batch) == 0).all()


@pytest.mark.parametrize("base", [1e9, 1e12])
@named(GROUPED + WHITENED)
def test_a_common_part_of_the_rewards_changes_no_advantage(objective, base):
    scores = [0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    groups = [0, 0, 0, 0, 1, 1, 1, 1]
    shifted = advantages(objective, rollout([base + score for score in scores], groups))
    assert torch.allclose(shifted, advantages(objective, rollout(scores, groups)), atol=1e-6)


@named(GROUPED + WHITENED)
def test_rewards_whose_squares_overflow_float32_keep_their_order(objective):
    credit = advantages(objective, rollout([3e19, 6e19, 3e19, 6e19], [0, 0, 1, 1]))
    assert credit.isfinite().all()
    assert (credit[::2, 0] < 0).all()
    assert (credit[1::2, 0] > 0).all()
