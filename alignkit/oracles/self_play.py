"""Every self-play algorithm as an update of exact log-probs: expectations instead of samples, so that runs on a `Game` show the
algorithm and nothing else. Runs are compared at equal judge questions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from alignkit.oracles.games import Game

Step = float | Tensor  # a number, or a tensor that broadcasts with [..., n]: a grid of step sizes runs in one go


class Update(Protocol):
    def __call__(self, game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
        """Next log-probs [..., n] from the current and the previous iterate's (None at the start)."""
        ...


def mirror_step(game: Game, log_policy: Tensor, log_opponent: Tensor, step: Step) -> Tensor:
    """log pi' = (1 - step beta) log pi + step beta log ref + step P q + constant: the step all the others are made of."""
    shrink = step * game.beta
    return ((1 - shrink) * log_policy + shrink * game.log_reference + step * game.win_rate(log_opponent)).log_softmax(-1)


def sequence_mixture(game: Game, log_policy: Tensor, weight: Step) -> Tensor:
    """Log-probs of the geometric mixture pi^(1 - weight) ref^weight, normalised."""
    return ((1 - weight) * log_policy + weight * game.log_reference).log_softmax(-1)


def omd(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """Online mirror descent: the mirror step against the policy itself."""
    return mirror_step(game, log_policy, log_policy, step)


def nash_md(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """Against the mixture of weight step * beta on ref (Munos et al. 2023, arXiv:2312.00886, section 6). With the step
    2 / (beta (t + 2)) KL(equilibrium || pi_T) <= 8 / (beta^2 (T + 1)); a constant step has a biased limit."""
    return mirror_step(game, log_policy, sequence_mixture(game, log_policy, step * game.beta), step)


def egpo(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """Extragradient: a trial step, then the real one from the same point against the trial policy (Zhou et al. 2025,
    arXiv:2503.08942). KL(equilibrium || pi) shrinks by 1 - step beta each time for steps up to 2 / (1 + 2 beta)."""
    return mirror_step(game, log_policy, omd(game, log_policy, None, step), step)


def nash_mp(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """Mirror prox in the paper's own step (arXiv:2505.19731, two proximal steps from the same point; theory: 2 beta).
    Equals `egpo` with the step (step / beta) / (1 + step)."""
    log_new = log_policy
    for _ in range(2):
        anchored = log_policy + step * game.log_reference + step / game.beta * game.win_rate(log_new)
        log_new = (anchored / (1 + step)).log_softmax(-1)
    return log_new


def online_ipo(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """Gradient descent (`step` = learning rate on the logits) on E over y, y' ~ pi of (D(y, y') - (P(y > y') - 1/2) / beta)^2
    (Calandriello et al. 2024, arXiv:2403.08635)."""
    return _squared_loss_descent(game, log_policy, log_policy, step)


def ipo_md(weight: float) -> Update:
    """Online IPO with both samples from the mixture of `weight` on ref (arXiv:2403.08635). Its limit is biased as Nash-MD's."""

    def update(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
        return _squared_loss_descent(game, log_policy, sequence_mixture(game, log_policy, weight), step)

    return update


def _squared_loss_descent(game: Game, log_policy: Tensor, log_sampler: Tensor, rate: Step) -> Tensor:
    """Gradient of the pair loss per logit k, samples and opponent from q: 4 q_k (h_k - E_q h), h = log pi/ref - P q / beta."""
    q = log_sampler.exp()
    h = log_policy - game.log_reference - game.win_rate(log_sampler) / game.beta
    return (log_policy - rate * 4 * q * (h - (q * h).sum(-1, keepdim=True))).log_softmax(-1)


def multiplicative_weights(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """pi exp(step P pi): SPPO's target (Wu et al. 2024, arXiv:2405.00675). It has no reference: its average
    iterate solves the game without the KL, its last one cycles."""
    return (log_policy + step * game.win_rate(log_policy)).log_softmax(-1)


def onpo(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """Optimistic multiplicative weights: pi_t exp(2 step P pi_t - step P pi_{t-1}) (arXiv:2502.16852). The old win rates are kept
    from the last iteration, so this asks one question per iteration."""
    old = 0.0 if previous is None else game.win_rate(previous)
    return (log_policy + step * (2 * game.win_rate(log_policy) - old)).log_softmax(-1)


def inpo(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """(beta / E) log ref + (1 - beta / E) log pi + P pi / E with E = `step`, an inverse step size (Zhang et al. 2024,
    arXiv:2407.00617): `omd` with the step 1 / E."""
    return omd(game, log_policy, None, 1 / step)


@dataclass(frozen=True)
class Algorithm:
    """An update and how many judge questions (evaluations of P q) one iteration asks."""

    update: Update
    queries: int = 1


ALGORITHMS: dict[str, Algorithm] = {
    "omd": Algorithm(omd),
    "nash_md": Algorithm(nash_md),
    "online_ipo": Algorithm(online_ipo),
    "ipo_md": Algorithm(ipo_md(0.125)),
    "egpo": Algorithm(egpo, queries=2),
    "nash_mp": Algorithm(nash_mp, queries=2),
    "sppo": Algorithm(multiplicative_weights),
    "onpo": Algorithm(onpo),
    "inpo": Algorithm(inpo),
}


def trajectory(
    game: Game, algorithm: Algorithm, step: Step | Callable[[int], Step], queries: int, start: Tensor | None = None
) -> Tensor:
    """Log-probs of all iterates, as many as `queries` judge questions allow: [1 + iterations, ..., n]. `step` is constant or a
    schedule of the iteration (from 0); `start` [..., n] are log-probs, the reference's when left out."""
    schedule = step if callable(step) else lambda _: step
    previous, log_policy = None, game.log_reference if start is None else start
    iterates = [log_policy]
    for t in range(queries // algorithm.queries):
        previous, log_policy = log_policy, algorithm.update(game, log_policy, previous, schedule(t))
        iterates.append(log_policy)
    return torch.stack(torch.broadcast_tensors(*iterates))


def gradient_to_mirror_step(rate: float, beta: float, n: int) -> float:
    """The mirror step that plain gradient descent with `rate` takes on the pair loss with uniform pairs of n actions."""
    return 4 * rate / (beta * n)


def prox_to_mirror_step(step: float, beta: float) -> float:
    """The `egpo` step that equals a `nash_mp` step; 2 beta becomes 2 / (1 + 2 beta)."""
    return step / beta / (1 + step)
