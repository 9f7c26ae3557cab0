"""A two-turn world that can be enumerated: the policy says one of three symbols, the world answers
with a function of it, the policy says another.

The world's answers cancel from every ratio, so the KL of whole episodes is that of the policy's own
tokens, and the expected gradient of each estimator must be that of E[R] - beta KL over own tokens.
"""

from dataclasses import dataclass, replace

import pytest
import torch

from alignkit.batches import RolloutBatch
from alignkit.objectives.online.kl_ppo import KLPPO
from alignkit.objectives.online.reinforce_plus_plus import ReinforcePlusPlus
from alignkit.objectives.online.rloo import RLOO
from alignkit.objectives.online.rpg import RPG
from alignkit.oracles.gradients import Population, gradient, regularised_value
from alignkit.policies.tabular import Tree

BETA = 0.3
SYMBOLS = 3
FOREIGN = 77  # whatever stands at foreign positions; no answer may depend on it


def two_turns() -> Tree:
    """Columns: the first symbol, the world's answer (not own), the second symbol. The policy of the
    second depends on all that came before, which the first symbol determines.
    """
    pairs = torch.cartesian_prod(torch.arange(SYMBOLS), torch.arange(SYMBOLS))
    first, second = pairs.unbind(1)
    answer = (first + 1) % 2  # two first symbols have the same answer
    zero = torch.zeros_like(first)
    return Tree(
        tokens=torch.stack([first, answer, second], 1),
        mask=torch.tensor([[True, False, True]]).expand(len(pairs), 3),
        prefixes=torch.stack([zero, zero, 1 + first], 1),
        states=1 + SYMBOLS,
        vocab=SYMBOLS,
    )


@dataclass(frozen=True)
class Turns(Population):
    """With rewards of single turns, and numbers at foreign positions that nobody may read."""

    turn_rewards: torch.Tensor | None = None  # [n, 3]
    noise: float = 0.0

    def batch(self, objective, theta, scores) -> RolloutBatch:
        batch = super().batch(objective, theta, scores)
        foreign = ~batch.tokens.mask

        def disturbed(values):
            return torch.where(foreign, self.noise, values)

        tokens = replace(
            batch.tokens,
            policy=disturbed(batch.tokens.policy),
            behavior=disturbed(batch.tokens.behavior),
            anchors={k: disturbed(v) for k, v in batch.tokens.anchors.items()},
            extras={k: disturbed(v) for k, v in batch.tokens.extras.items()},
        )
        rewards = None
        if self.turn_rewards is not None:
            rewards = disturbed(self.turn_rewards[self.rows])
        return replace(batch, tokens=tokens, rewards=rewards)


SUM = {"aggregation": "sequence_sum"}
OBJECTIVES = {
    "reinforce": RLOO(beta=BETA),
    "rpg": RPG(beta=BETA, clip_low=None, clip_high=None, dual_clip=None, **SUM),
    "kl_ppo": KLPPO(beta=BETA, whiten_advantages=False, value_weight=0.0, **SUM),
}


@pytest.mark.parametrize("by_turn", [False, True], ids=["at the end", "by turn"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_expected_gradient_is_that_of_reward_minus_kl_over_own_tokens(name, by_turn):
    tree = two_turns()
    plain = Population.build(tree, seed=3)
    rewards = torch.zeros(tree.mask.shape, dtype=torch.float64)
    noise = torch.Generator().manual_seed(1)
    rewards[:, 2] = torch.rand(len(rewards), dtype=torch.float64, generator=noise)
    rewards[:, 0] = tree.tokens[:, 0] * 0.7  # of the first turn: depends on its symbol alone
    scores = rewards.sum(-1)

    population = Turns(**vars(plain), turn_rewards=rewards if by_turn else None)
    delivered = population.delivered(OBJECTIVES[name], scores)
    wanted = gradient(
        lambda theta: -regularised_value(tree, theta, scores, plain.reference, BETA), plain.theta
    )
    assert (delivered - wanted).abs().max() < 1e-10
    assert wanted.abs().max() > 0.01


@pytest.mark.parametrize(
    "objective",
    [*OBJECTIVES.values(), ReinforcePlusPlus(beta=BETA)],
    ids=lambda o: type(o).__name__,
)
def test_what_stands_at_foreign_positions_changes_nothing(objective):
    tree = two_turns()
    plain = Population.build(tree, seed=3)
    scores = torch.linspace(-1, 1, len(tree.tokens), dtype=torch.float64)
    rewards = torch.where(tree.mask, scores.unsqueeze(-1) / 2, 0.0)
    clean = Turns(**vars(plain), turn_rewards=rewards).delivered(objective, scores)
    noisy = Turns(**vars(plain), turn_rewards=rewards, noise=float("nan"))
    noisy = noisy.delivered(objective, scores)
    assert torch.equal(clean, noisy)
    assert clean.abs().max() > 0


def test_a_turn_is_not_credited_with_the_reward_of_an_earlier_one():
    objective = KLPPO(beta=BETA, whiten_advantages=False, gamma=0.5)
    population = Population.build(two_turns(), seed=3)
    scores = torch.zeros(len(population.tree.tokens), dtype=torch.float64)
    of_first = torch.zeros(population.tree.mask.shape, dtype=torch.float64)
    of_first[:, 0] = population.tree.tokens[:, 0]

    def second_turns(turn_rewards):
        turns = Turns(**vars(population), turn_rewards=turn_rewards)
        batch = turns.batch(objective, population.theta, scores)
        return objective.credit(batch, objective.init_state())[0].advantages[:, 2]

    nothing = second_turns(0 * of_first)
    assert torch.equal(second_turns(of_first), nothing)
    assert not torch.equal(second_turns(of_first.roll(2, 1)), nothing)
