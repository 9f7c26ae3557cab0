"""Exact solutions of KL-regularised preference games, in float64.

A game is a table `preference` [..., n, n] (probability that the row beats the column, P + P^T = 1),
a `reference` [..., n] and a temperature `beta`. The payoff of pi against q is  V(pi, q) = pi P q -
beta KL(pi || ref) + beta KL(q || ref)  (Munos et al. 2023, arXiv:2312.00886). Its one symmetric
equilibrium satisfies  log pi = log ref + P pi / beta + constant.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alignkit.errors import ConfigError, NumericsError, ShapeError


def best_response(preference: Tensor, reference: Tensor, opponent: Tensor, beta: float) -> Tensor:
    """argmax over pi of V(pi, opponent) = ref exp(P opponent / beta), normalised: [..., n, n],
    [..., n] x 2 -> [..., n].
    """
    preference, reference, opponent = _checked(beta, preference, reference, opponent)
    return _log_best_response(preference, reference.log(), opponent, beta).exp()


def best_response_value(
    preference: Tensor, reference: Tensor, opponent: Tensor, beta: float
) -> Tensor:
    """max over pi of V(pi, opponent): [...]. Convex in `opponent`, and its minimum 1/2 is reached
    at the equilibrium alone.
    """
    preference, reference, opponent = _checked(beta, preference, reference, opponent)
    log_partition = (reference.log() + _win_rate(preference, opponent) / beta).logsumexp(-1)
    return beta * (log_partition + _kl(opponent.log(), reference.log()))


def game_value(
    preference: Tensor, reference: Tensor, policy: Tensor, opponent: Tensor, beta: float
) -> Tensor:
    """V(policy, opponent): [..., n, n], [..., n] x 3 -> [...]; 1/2 against itself."""
    preference, reference, policy, opponent = _checked(
        beta, preference, reference, policy, opponent
    )
    win_rate = (policy * _win_rate(preference, opponent)).sum(-1)
    return win_rate + beta * (
        _kl(opponent.log(), reference.log()) - _kl(policy.log(), reference.log())
    )


def duality_gap(preference: Tensor, reference: Tensor, policy: Tensor, beta: float) -> Tensor:
    """max over pi of V(pi, policy) - min over q of V(policy, q), at least 0: [..., n, n], [..., n]
    x 2 (probabilities) -> [...].

    Computed as beta KL(policy || BR) + beta KL(policy || BR'), the best responses of the row and of
    the column player: equal to the difference for any table, 2 beta KL(policy || BR) where P + P^T
    = 1, and free of its cancellation (Zhou et al. 2025, arXiv:2503.08942, define the gap). A gap G
    certifies KL(policy || equilibrium) <= G / (2 beta).
    """
    preference, reference, policy = _checked(beta, preference, reference, policy)
    return _gap(preference, reference.log(), policy.log(), beta)


def regularized_nash(preference: Tensor, reference: Tensor, beta: float) -> Tensor:
    """The symmetric equilibrium: preference [n, n], reference [n]
    (full support) -> probabilities [n].

    Newton's method on x = log ref + (P - 1/2) softmax(x) / beta while the temperature is lowered to
    `beta`. The Jacobian cannot be singular: P - 1/2 times the softmax's covariance has imaginary
    eigenvalues only. Raises ConfigError when P + P^T is not 1 (to 1e-6), NumericsError when the
    residual in x stays above 1e-12 (1e-15 / beta for beta < 0.001).
    """
    preference, reference = _checked(beta, preference, reference)
    if preference.dim() != 2 or preference.shape[0] != reference.shape[-1]:
        raise ShapeError(
            f"regularized_nash: one game at a time, got preference {list(preference.shape)}; want [n, n]"
        )
    asymmetry = float((preference + preference.T - 1).abs().max())
    if asymmetry > 1e-6:
        raise ConfigError(
            f"preference: P + P^T must be 1, it is off by {asymmetry:.1e}; use (P + 1 - P^T) / 2 of a noisy judge"
        )
    if not bool((reference > 0).all()):
        raise ConfigError(
            "reference: every action needs a positive probability; leave out the actions that have none"
        )
    # keeps x small where the policy lives: the softmax then loses no digits at a small beta
    advantage = preference - 0.5
    logits = reference.log()
    temperature = max(1.0, beta)
    while True:
        logits, residual = _newton(advantage, reference.log(), logits, temperature)
        if temperature == beta:
            break
        temperature = max(beta, temperature / 2)
    allowed = 1e-12 * max(1.0, 1e-3 / beta)
    if not residual <= allowed:
        raise NumericsError(
            f"regularized_nash: residual {residual:.1e} at beta {beta}, more than {allowed:.1e}; raise beta"
        )
    return logits.softmax(-1)


@dataclass(frozen=True)
class Game:
    """One or many games of n actions; leading axes broadcast."""

    preference: Tensor  # [..., n, n] float64
    log_reference: Tensor  # [..., n] float64
    beta: float

    def gap(self, log_policy: Tensor) -> Tensor:
        """Duality gap of log-probs [..., n]: [...]."""
        return _gap(self.preference, self.log_reference, log_policy, self.beta)

    def win_rate(self, log_opponent: Tensor) -> Tensor:
        """How often each action beats the opponent [..., n]: the one question asked of the judge,
        counted by `queries`.
        """
        return _win_rate(self.preference, log_opponent.exp())


def random_games(count: int, n: int, beta: float, *, seed: int = 0) -> Game:
    """`count` games of n actions: P uniform below the diagonal, P + P^T = 1, reference = softmax of
    N(0, 1) logits.
    """
    generator = torch.Generator().manual_seed(seed)
    lower = torch.rand(count, n, n, generator=generator, dtype=torch.float64).tril(-1)
    upper = (1 - lower.mT).triu(1)
    logits = torch.randn(count, n, generator=generator, dtype=torch.float64)
    return Game(
        lower + upper + 0.5 * torch.eye(n, dtype=torch.float64), logits.log_softmax(-1), beta
    )


def _newton(
    advantage: Tensor, log_reference: Tensor, logits: Tensor, beta: float
) -> tuple[Tensor, float]:
    """Damped Newton on x - log ref - A softmax(x) / beta = 0, until rounding stops it. Returns the
    best x and its residual.
    """

    def equation(x: Tensor) -> Tensor:
        return x - log_reference - advantage @ x.softmax(-1) / beta

    value = equation(logits)
    for _ in range(100):
        policy = logits.softmax(-1)
        jacobian = (
            torch.eye(len(policy), dtype=policy.dtype)
            - advantage @ (policy.diag() - policy.outer(policy)) / beta
        )
        direction = torch.linalg.solve(jacobian, value)
        # Every Newton direction descends, so some scale of it does.
        for scale in (0.5**k for k in range(30)):
            trial = logits - scale * direction
            trial_value = equation(trial)
            if trial_value.norm() < value.norm():
                break
        else:
            break
        logits = trial
        value = trial_value
    return logits, float(value.abs().max())


def _log_best_response(
    preference: Tensor, log_reference: Tensor, opponent: Tensor, beta: float
) -> Tensor:
    return (log_reference + _win_rate(preference, opponent) / beta).log_softmax(-1)


def _gap(preference: Tensor, log_reference: Tensor, log_policy: Tensor, beta: float) -> Tensor:
    policy = log_policy.exp()
    row = _log_best_response(preference, log_reference, policy, beta)
    column = _log_best_response(1 - preference.mT, log_reference, policy, beta)
    return beta * (_kl(log_policy, row) + _kl(log_policy, column))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of two distributions [..., n] as a sum of terms p d - p + q >= 0 with d = log p -
    log q: near p = q it keeps its relative precision, where the sum of p d alone drowns in rounding
    at 1e-16.
    """
    p = log_p.exp()
    q = log_q.exp()
    difference = torch.where(p > 0, log_p - log_q, 0.0)
    close = difference.abs() < 1
    near = p * (difference + torch.expm1(-torch.where(close, difference, 0.0)))
    return torch.where(close & (p > 0), near, p * difference - p + q).sum(-1)


def _win_rate(preference: Tensor, opponent: Tensor) -> Tensor:
    """P q: how often each action beats the opponent. [..., n, n], [..., n] -> [..., n]."""
    return (preference @ opponent.unsqueeze(-1)).squeeze(-1)


def _checked(beta: float, preference: Tensor, *policies: Tensor) -> tuple[Tensor, ...]:
    """All in float64 after checks: shapes, beta > 0, preferences in [0, 1], policies that sum to 1
    (to 1e-4; then exactly).
    """
    if not (0 < beta < float("inf")):
        raise ConfigError(f"beta must be a positive number, got {beta}")

    n = preference.shape[-1]
    square = preference.dim() >= 2 and preference.shape[-2] == n
    if not square or any(policy.dim() < 1 or policy.shape[-1] != n for policy in policies):
        shapes = ", ".join(str(list(t.shape)) for t in (preference, *policies))
        raise ShapeError(
            f"want preference [..., n, n] and policies [..., n] over the same actions, got {shapes}"
        )

    if not bool(((preference >= 0) & (preference <= 1)).all()):
        raise ConfigError("preference: every entry must be a probability in [0, 1]")
    for policy in policies:
        if not (bool((policy >= 0).all()) and bool(((policy.sum(-1) - 1).abs() < 1e-4).all())):
            raise ConfigError(
                "policies must be probabilities that sum to 1 over the last axis (not logits or log-probs)"
            )

    wide = [policy.double() for policy in policies]
    return (preference.double(), *(policy / policy.sum(-1, keepdim=True) for policy in wide))
