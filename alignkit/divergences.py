"""f-divergences D_f(policy || reference) = E_reference f(u), u = policy / reference, as functions
of the log-ratio x = log u.

Every exponential is continued by its tangent where its argument passes +-30: exp(30) = 1e13, and so
are the largest slope and (inverted) the smallest, so values and gradients stay finite for |x| up to
1e4 in float32 and bfloat16, f' stays increasing and its gradient never changes sign or dies. Inside
+-30 the functions are exact.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

from alignkit.errors import ConfigError

LIMIT = 30.0
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Divergence:
    """A generator f with f(1) = 0 through its values at the log-ratio x: [...] -> [...].

    `f_prime_inverse` returns the LOG-ratio at which f' takes the given value; `f_prime_sup` is the
    least upper bound of f'.
    """

    name: str
    f: Function  # x -> f(e^x)
    f_prime: Function  # x -> f'(e^x)
    f_prime_inverse: Function  # z -> log u with f'(u) = z
    f_prime_sup: float = math.inf

    def check_admissible(self) -> None:
        """ConfigError unless f'(0+) = -inf, the condition for f-DPO: only then the optimum is
        positive everywhere and the normaliser is a constant of the prompt (Wang et al. 2023,
        arXiv:2309.16240).
        """
        near, nearer = self.f_prime(torch.tensor([-15.0, -30.0], dtype=torch.float64)).tolist()
        if not nearer < near - 1:
            raise ConfigError(
                f"divergence {self.name!r} is not admissible: f'(u) stays near {nearer:.3g} as u -> 0, it must go to -inf "
                f"(the optimum could have zeros, which no preference loss can reach); allowed: {', '.join(names())}"
            )


def _exp(x: Tensor, lower: float = -math.inf) -> Tensor:
    """exp between `lower` and 30, its tangents outside."""
    inside = x.clamp(lower, LIMIT)
    return inside.exp() * (1 + (x - inside))


def _expm1(x: Tensor) -> Tensor:
    """exp - 1 between -30 and 30, its tangents outside. (The gradient of torch.expm1 rounds to 0
    from x = -17 down.)
    """
    inside = x.clamp(-LIMIT, LIMIT)
    return torch.where(x > -1, torch.expm1(inside), inside.exp() - 1) + inside.exp() * (x - inside)


def _logsigmoid(x: Tensor) -> Tensor:
    """log sigmoid up to 30, its tangent above."""
    inside = x.clamp(max=LIMIT)
    return torch.nn.functional.logsigmoid(inside) + (x - inside) * math.exp(-LIMIT)


def _log_omega(z: Tensor) -> Tensor:
    """The x with x + e^x = z (log of Wright's omega, so W(e^z) = e^x) by Newton's method, monotone
    from its start.
    """
    x = torch.where(z > 1, z.clamp(min=1).log(), z)
    for _ in range(12):
        x = x - (x + x.exp() - z) / (1 + x.exp())
    return x


def _reverse_kl() -> Divergence:
    return Divergence("reverse_kl", lambda x: x * _exp(x), lambda x: x + 1, lambda z: z - 1)


def _reverse_ukl() -> Divergence:
    return Divergence("reverse_ukl", lambda x: x * _exp(x) - _exp(x) + 1, lambda x: x, lambda z: z)


def _forward_kl() -> Divergence:
    return Divergence(
        "forward_kl", lambda x: -x, lambda x: -_exp(-x, -LIMIT), lambda z: -torch.log(-z), 0.0
    )


def _forward_ukl() -> Divergence:
    return Divergence(
        "forward_ukl",
        lambda x: _exp(x) - 1 - x,
        lambda x: -_expm1(-x),
        lambda z: -torch.log1p(-z),
        1.0,
    )


def _jensen_shannon() -> Divergence:
    def f(
        x: Tensor,
    ) -> Tensor:  # u log u - (u + 1) log((u + 1) / 2): twice the Jensen-Shannon divergence
        return _exp(x) * (_logsigmoid(x) + math.log(2)) + _logsigmoid(-x) + math.log(2)

    return Divergence(
        "jensen_shannon",
        f,
        lambda x: math.log(2) + _logsigmoid(x),
        lambda z: z - torch.log(2 - z.exp()),
        math.log(2),
    )


def _alpha(alpha: float = 0.5) -> Divergence:
    if not 0 < alpha < 1:
        raise ConfigError(
            f"divergence 'alpha': alpha is {alpha}, it must lie between 0 and 1; 0 is 'reverse_kl', 1 is 'forward_kl', "
            "below 0 f'(0+) is finite, which is not admissible"
        )
    return Divergence(
        "alpha",
        lambda x: ((1 - alpha) * _expm1(x) - _expm1((1 - alpha) * x)) / (alpha * (1 - alpha)),
        lambda x: -_expm1(-alpha * x) / alpha,
        lambda z: -torch.log1p(-alpha * z) / alpha,
        1 / alpha,
    )


def _hellinger() -> Divergence:
    return Divergence(
        "hellinger",
        lambda x: _expm1(x / 2) ** 2,
        lambda x: -_expm1(-x / 2),
        lambda z: -2 * torch.log1p(-z),
        1.0,
    )


def _jeffreys() -> Divergence:
    return Divergence(
        "jeffreys", lambda x: x * _expm1(x), lambda x: x - _expm1(-x), lambda z: -_log_omega(1 - z)
    )


def _neyman_chi2() -> Divergence:
    return Divergence(
        "neyman_chi2",
        lambda x: (_exp(x / 2) - _exp(-x / 2)) ** 2,
        lambda x: -_expm1(-2 * x),
        lambda z: -torch.log1p(-z) / 2,
        1.0,
    )


def _chi2_kl() -> Divergence:
    return Divergence(
        "chi2_kl",
        lambda x: _expm1(x) ** 2 / 2 + x * _exp(x),
        lambda x: _exp(x, -LIMIT) + x,
        _log_omega,
    )


_TABLE: dict[str, Callable[..., Divergence]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "jensen_shannon": _jensen_shannon,
    "alpha": _alpha,
    "hellinger": _hellinger,
    "jeffreys": _jeffreys,
    "neyman_chi2": _neyman_chi2,
    "chi2_kl": _chi2_kl,
    "reverse_ukl": _reverse_ukl,
    "forward_ukl": _forward_ukl,
}
_REFUSED = {
    "pearson_chi2": "f'(0+) = -2 is finite, so its optimum can have zeros that no preference loss reaches; chi2_kl mixes in a KL",
    "total_variation": "f' is a step function and has no inverse",
}


def names() -> Sequence[str]:
    """Names that `get` knows."""
    return tuple(_TABLE)


def refused_names() -> Sequence[str]:
    """Names that `get` refuses with a reason of their own."""
    return tuple(_REFUSED)


def get(name: str, **parameters: float) -> Divergence:
    """The divergence called `name`; only `alpha` takes a parameter
    (`alpha`, between 0 and 1; default 0.5).

    ConfigError for an unknown or inadmissible divergence and for a parameter outside its range. The
    `_ukl` forms are the KLs between unnormalised measures (f'(1) = 0); between distributions they
    equal their siblings.

    >>> get("forward_kl").f_prime(torch.tensor(0.0))
    tensor(-1.)
    """
    if name in _REFUSED:
        raise ConfigError(
            f"divergence {name!r} is not admissible: {_REFUSED[name]}; allowed: {', '.join(_TABLE)}"
        )
    if name not in _TABLE:
        near = get_close_matches(name, _TABLE, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"unknown divergence {name!r}; {hint}allowed: {', '.join(_TABLE)}")
    if unknown := set(parameters) - ({"alpha"} if name == "alpha" else set()):
        raise ConfigError(
            f"divergence {name!r} takes no parameter {', '.join(sorted(unknown))}; only 'alpha' has one (alpha)"
        )
    return _TABLE[name](**parameters)


def register(divergence: Divergence) -> None:
    """Make a divergence of one's own available to `get` and to recipes under its name. ConfigError
    if the name is taken or the divergence is not admissible.
    """
    if divergence.name in _TABLE or divergence.name in _REFUSED:
        raise ConfigError(f"divergence {divergence.name!r} exists already; choose another name")
    divergence.check_admissible()
    _TABLE[divergence.name] = lambda: divergence


def regularized_argmax(divergence: Divergence, score: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Log-probs [..., n] of argmax_policy E_policy[score] - D_f(policy || reference); score and
    reference log-probs [..., n].

    policy = reference * f'^-1(score - c), where bisection (in float64) finds the one c that
    normalises it; Wang et al. 2023, arXiv:2309.16240. Responses that the reference excludes (-inf)
    stay excluded.
    """
    support = reference_logprobs > -math.inf
    log_reference = reference_logprobs.double()
    best = torch.where(support, score, -math.inf).amax(-1, keepdim=True).double()
    worst = torch.where(support, score, math.inf).amin(-1, keepdim=True).double()
    gap = torch.where(support, score.double(), best) - best  # <= 0

    def log_policy(excess: Tensor) -> Tensor:
        return log_reference + divergence.f_prime_inverse(gap + excess)

    # `excess` is f' at the best response: at f'(1) no ratio exceeds 1, at the upper end none is
    # below 1 (or one is infinite)
    low = divergence.f_prime(torch.zeros_like(best))
    high = (low + best - worst).clamp(max=divergence.f_prime_sup)
    for _ in range(200):
        middle = (low + high) / 2
        heavy = log_policy(middle).logsumexp(-1, keepdim=True) > 0
        low = torch.where(heavy, low, middle)
        high = torch.where(heavy, middle, high)
    return log_policy(low).log_softmax(-1).to(score.dtype)
