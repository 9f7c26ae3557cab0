"""The extragradient step of a policy over n actions, against its closed form; what it leaves
behind.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from alignkit.batches import Bundle
from alignkit.losses import online_ipo_loss
from alignkit.oracles.games import Game, random_games
from alignkit.oracles.self_play import egpo, gradient_to_mirror_step
from alignkit.policies.pair import PolicyPair
from alignkit.training.updates import extragradient


def setting(n: int, beta: float, seed: int) -> tuple[Game, Tensor]:
    """A game of n actions and the logits of a policy."""
    games = random_games(1, n, beta, seed=seed)
    start = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Game(games.preference[0], games.log_reference[0], beta), start


def enumerated_loss(game: Game, log_policy: Tensor, log_opponent: Tensor) -> Tensor:
    """EGPO's loss over all ordered pairs of actions, with exact win rates."""
    n = len(log_policy)
    first, second = (
        t.flatten() for t in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    )
    win_rate = game.win_rate(log_opponent)
    logps = (
        log_policy[first],
        log_policy[second],
        game.log_reference[first],
        game.log_reference[second],
    )
    return online_ipo_loss(*logps, win_rate[first] - win_rate[second], beta=game.beta).mean()


class Tabular(nn.Module):
    """A policy over n actions, small enough to know every step in closed form."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits.clone())


def extragradient_run(game: Game, start: Tensor, optimizer_of, steps: int):
    """Extragradient steps on the enumerated EGPO loss; also the optimiser states seen at the start
    of each backward.
    """
    policy = Tabular(start)
    pair, optimizer = PolicyPair(policy, None, {}), optimizer_of(policy.parameters())
    seen: list[tuple[Tensor, dict]] = []

    def collect() -> Sequence[Bundle]:
        # the opponent of this half step
        return [Bundle(policy.logits.detach().log_softmax(-1), [], [])]

    def backward(bundles: Sequence[Bundle]) -> dict[str, float]:
        state = (
            {k: v.clone() for k, v in optimizer.state[policy.logits].items()}
            if policy.logits in optimizer.state
            else {}
        )
        seen.append((policy.logits.detach().clone(), state))
        assert policy.logits.grad is None
        enumerated_loss(game, policy.logits.log_softmax(-1), bundles[0].prompt).backward()
        return {}

    for _ in range(steps):
        extragradient(collect, backward, pair, optimizer)
    return policy.logits.detach(), optimizer, seen


def test_extragradient_with_sgd_is_the_closed_form():
    (game, start), rate = setting(6, 0.1, 9), 0.1
    expected = start.log_softmax(-1)
    for _ in range(5):
        expected = egpo(game, expected, None, gradient_to_mirror_step(rate, 0.1, 6))
    logits, _, _ = extragradient_run(game, start, lambda p: torch.optim.SGD(p, lr=rate), 5)
    torch.testing.assert_close(logits.log_softmax(-1), expected, rtol=0, atol=1e-12)


def test_extragradient_restores_parameters_and_adam_bit_for_bit():
    game, start = setting(6, 0.1, 11)
    _, optimizer, seen = extragradient_run(
        game, start, lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1), 3
    )
    for (before, state), (restored, rewound_state) in zip(seen[::2], seen[1::2]):
        assert torch.equal(before, restored)
        assert state.keys() == rewound_state.keys()
        assert all(torch.equal(state[name], rewound_state[name]) for name in state)
    assert seen[1][1] == {}  # before the first step there is no state, and none is left behind
    (moments,) = optimizer.state.values()
    assert moments["step"].item() == 3  # one tick per iteration, not two
