"""Every self-play algorithm as an update of exact log-probs: expectations instead of samples, so
that runs on a `Game` show the algorithm and nothing else. Runs are compared at equal judge
questions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from alignkit.oracles.games import Game

# a number, or a tensor that broadcasts with [..., n]: a grid of step sizes runs in one go
Step = float | Tensor


class Update(Protocol):
    def __call__(
        self, game: Game, log_policy: Tensor, previous: Tensor | None, step: Step
    ) -> Tensor:
        """Next log-probs [..., n] from the current ones and those that the algorithm remembers, the
        previous iterate's unless it says otherwise (None at the start).
        """
        ...


def mirror_step(game: Game, log_policy: Tensor, log_opponent: Tensor, step: Step) -> Tensor:
    """log pi' = (1 - step beta) log pi + step beta log ref + step P q + constant: the step all the
    others are made of.
    """
    shrink = step * game.beta
    return (
        (1 - shrink) * log_policy + shrink * game.log_reference + step * game.win_rate(log_opponent)
    ).log_softmax(-1)


def sequence_mixture(game: Game, log_policy: Tensor, weight: Step) -> Tensor:
    """Log-probs of the geometric mixture pi^(1 - weight) ref^weight, normalised."""
    return ((1 - weight) * log_policy + weight * game.log_reference).log_softmax(-1)


def omd(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """Online mirror descent: the mirror step against the policy itself."""
    return mirror_step(game, log_policy, log_policy, step)


def nash_md(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """Against the mixture of weight step * beta on ref (Munos et al. 2023, arXiv:2312.00886,
    section 6). With the step 2 / (beta (t + 2)) KL(equilibrium || pi_T) <= 8 / (beta^2 (T + 1)); a
    constant step has a biased limit.
    """
    return mirror_step(game, log_policy, sequence_mixture(game, log_policy, step * game.beta), step)


def egpo(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """Extragradient: a trial step, then the real one from the same point against the trial policy
    (Zhou et al. 2025, arXiv:2503.08942). KL(equilibrium || pi) shrinks by 1 - step beta each time
    for steps up to 2 / (1 + 2 beta).
    """
    return mirror_step(game, log_policy, omd(game, log_policy, None, step), step)


def nash_mp(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """Mirror prox in the paper's own step (arXiv:2505.19731, two proximal steps from the same
    point; theory: 2 beta). Equals `egpo` with the step (step / beta) / (1 + step).
    """
    log_new = log_policy
    for _ in range(2):
        anchored = (
            log_policy + step * game.log_reference + step / game.beta * game.win_rate(log_new)
        )
        log_new = (anchored / (1 + step)).log_softmax(-1)
    return log_new


def online_ipo(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """Gradient descent (`step` = learning rate on the logits) on E over y, y' ~ pi of (D(y, y') -
    (P(y > y') - 1/2) / beta)^2 (Calandriello et al. 2024, arXiv:2403.08635).
    """
    return _squared_loss_descent(game, log_policy, log_policy, step)


def ipo_md(weight: float) -> Update:
    """Online IPO with both samples from the mixture of `weight` on ref (arXiv:2403.08635). Its
    limit is biased as Nash-MD's.
    """

    def update(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
        return _squared_loss_descent(
            game, log_policy, sequence_mixture(game, log_policy, weight), step
        )

    return update


def _squared_loss_descent(
    game: Game, log_policy: Tensor, log_sampler: Tensor, rate: Step
) -> Tensor:
    """Gradient of the pair loss per logit k, samples and opponent from q: 4 q_k (h_k - E_q h), h =
    log pi/ref - P q / beta.
    """
    q = log_sampler.exp()
    h = log_policy - game.log_reference - game.win_rate(log_sampler) / game.beta
    return (log_policy - rate * 4 * _centred(q, h)).log_softmax(-1)


def multiplicative_weights(
    game: Game, log_policy: Tensor, previous: Tensor | None, step: Step
) -> Tensor:
    """pi exp(step P pi): SPPO's target (Wu et al. 2024, arXiv:2405.00675). It has no reference: its
    average iterate solves the game without the KL, its last one cycles.
    """
    return (log_policy + step * game.win_rate(log_policy)).log_softmax(-1)


def onpo(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """Optimistic multiplicative weights: pi_t exp(2 step P pi_t - step P pi_{t-1})
    (arXiv:2502.16852). The old win rates are kept from the last iteration, so this asks one
    question per iteration.
    """
    old = 0.0 if previous is None else game.win_rate(previous)
    return (log_policy + step * (2 * game.win_rate(log_policy) - old)).log_softmax(-1)


def inpo(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """(beta / E) log ref + (1 - beta / E) log pi + P pi / E with E = `step`, an inverse step size
    (Zhang et al. 2024, arXiv:2407.00617): `omd` with the step 1 / E.
    """
    return omd(game, log_policy, None, 1 / step)


def moving_average(past: Tensor | None, log_policy: Tensor) -> Tensor:
    """Of the iterates' log-probs, the parameters of these policies; a weight of 0.9 on the past."""
    return log_policy if past is None else (0.9 * past + 0.1 * log_policy).log_softmax(-1)


def nash_ema(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """The mirror step against the moving average of the iterates'
    parameters (Munos et al. 2023, arXiv:2312.00886).
    """
    return mirror_step(game, log_policy, moving_average(previous, log_policy), step)


def rspo(divergence: Literal["reverse_kl", "forward_kl", "chi2"]) -> Update:
    """Gradient descent on SPPO's regression at the present policy plus 2 beta times a divergence to
    the reference, over SPPO's step (Tang et al. 2025, arXiv:2503.00030). With the reverse KL it is
    `online_ipo` at another rate.
    """

    def update(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
        pi = log_policy.exp()
        reference = game.log_reference.exp()
        log_ratio = log_policy - game.log_reference
        pull = {
            "reverse_kl": lambda: _centred(pi, log_ratio),
            "forward_kl": lambda: pi - reference,
            "chi2": lambda: _centred(pi, 2 * log_ratio.exp()),
        }[divergence]()
        return (
            log_policy + step * 2 * (_centred(pi, game.win_rate(log_policy)) - game.beta * pull)
        ).log_softmax(-1)

    return update


def _centred(pi: Tensor, values: Tensor) -> Tensor:
    """pi (values - E_pi values): the gradient in the logits of E_pi values [..., n]."""
    return pi * (values - (pi * values).sum(-1, keepdim=True))


def online_dpo(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """Gradient descent on the DPO loss of two samples of the policy, both orders with their
    probabilities (Guo et al. 2024, arXiv:2402.04792). For a Bradley-Terry judge it ends at ref
    exp(reward / beta), for others not at the equilibrium.
    """
    pi = log_policy.exp()
    return (
        log_policy
        + step * game.beta * 2 * pi * (_surplus(game, log_policy) @ pi.unsqueeze(-1)).squeeze(-1)
    ).log_softmax(-1)


def xpo(game: Game, log_policy: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """The same with the second sample from the reference (Xie et al. 2024, arXiv:2405.21046; its
    optimism, 1e-5, left out).
    """
    pi = log_policy.exp()
    reference = game.log_reference.exp()
    surplus = _surplus(game, log_policy)
    wins = pi * (surplus @ reference.unsqueeze(-1)).squeeze(-1)
    losses = reference * (pi.unsqueeze(-2) @ surplus).squeeze(-2)
    return (log_policy + step * game.beta * (wins - losses)).log_softmax(-1)


def _surplus(game: Game, log_policy: Tensor) -> Tensor:
    """How much more often a response wins than the policy's implicit rewards say: [..., n, n]."""
    implicit = game.beta * (log_policy - game.log_reference)
    return game.preference - (implicit.unsqueeze(-1) - implicit.unsqueeze(-2)).sigmoid()


def last_iterate(past: Tensor | None, log_policy: Tensor) -> Tensor:
    """What most algorithms remember."""
    return log_policy


@dataclass(frozen=True)
class Algorithm:
    """An update, how many judge questions (evaluations of P q) one iteration asks, and what is
    remembered of the iterates.
    """

    update: Update
    queries: int = 1
    remember: Callable[[Tensor | None, Tensor], Tensor] = last_iterate


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
    "nash_ema": Algorithm(nash_ema, remember=moving_average),
    "rspo": Algorithm(rspo("reverse_kl")),
    "online_dpo": Algorithm(online_dpo),
    "xpo": Algorithm(xpo),
}


def trajectory(
    game: Game,
    algorithm: Algorithm,
    step: Step | Callable[[int], Step],
    queries: int,
    start: Tensor | None = None,
) -> Tensor:
    """Log-probs of all iterates, as many as `queries` judge questions allow: [1 + iterations, ...,
    n]. `step` is constant or a schedule of the iteration (from 0); `start` [..., n] are log-probs,
    the reference's when left out.
    """
    schedule = step if callable(step) else lambda _: step
    previous = None
    log_policy = game.log_reference if start is None else start
    iterates = [log_policy]
    for t in range(queries // algorithm.queries):
        new = algorithm.update(game, log_policy, previous, schedule(t))
        previous = algorithm.remember(previous, log_policy)
        log_policy = new
        iterates.append(log_policy)
    return torch.stack(torch.broadcast_tensors(*iterates))


def step_grid(name: str, beta: float) -> Tensor:
    """Step sizes of an algorithm to choose from [S, 1, 1]; one alone where theory gives it."""
    theory = {"egpo": 2 / (1 + 2 * beta), "nash_mp": 2 * beta}
    if name in theory:
        return torch.tensor([theory[name]], dtype=torch.float64).reshape(-1, 1, 1)
    grid = torch.logspace(-2.5, 1.5, 33, dtype=torch.float64).reshape(-1, 1, 1)
    if name in ("online_dpo", "xpo"):
        return grid / beta  # their losses' gradients are in proportion to beta
    # where the step towards the reference, or the mixture, is still one
    grid = grid[grid * beta <= 1].reshape(-1, 1, 1)
    return 1 / grid if name == "inpo" else grid  # its step is an inverse one


def tuned(game: Game, name: str, questions: int) -> tuple[Tensor, float]:
    """Median duality gap over the games after each iteration [1 + iterations] at the step of the
    grid that ends best, and that step; a gap that is not a number counts as infinite.
    """
    grid = step_grid(name, game.beta)
    iterates = trajectory(game, ALGORITHMS[name], grid, questions)  # [1 + iterations, S, games, n]
    gaps = game.gap(iterates).nan_to_num(nan=torch.inf).median(-1).values
    best = int(gaps[-1].argmin())
    return gaps[:, best], float(grid[best])


def gradient_to_mirror_step(rate: float, beta: float, n: int) -> float:
    """The mirror step that plain gradient descent with `rate` takes on the pair loss with uniform
    pairs of n actions.
    """
    return 4 * rate / (beta * n)


def prox_to_mirror_step(step: float, beta: float) -> float:
    """The `egpo` step that equals a `nash_mp` step; 2 beta becomes 2 / (1 + 2 beta)."""
    return step / beta / (1 + step)
