"""The exact law of what a decoder outputs, over a space that is small enough to list.

Notation: `reference` p and the returned law q are probabilities [n] in float64, `rewards` r [n].
The target of all of them is the tilted law p e^(r / beta) / Z.
"""

import math

import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.objectives.base import best_of_n_logprobs
from alignkit.tensors import check_same_shape

# The integral of `soft_best_of_n` is a trapezoid sum in log t. Its integrand is analytic in a strip
# of half-width pi / 2, so the error falls as exp(-pi ** 2 / STEP): far below float64's rounding.
STEP = 0.2
TAIL = 45.0  # nats below its peak at which the integrand is cut off
CHUNK = 4096  # points of the integral that are in memory at a time


def best_of_n(reference: Tensor, rewards: Tensor, n: int) -> Tensor:
    """The law of the best of `n` samples of the reference: [n] x 2 -> [n], float64.

    Outcomes with equal rewards share their mass in proportion to the reference. ConfigError for
    probabilities that do not sum to 1, rewards that are not finite, or n below 1. Source: Beirami
    et al. 2024, arXiv:2401.01879, lemma 1.
    """
    reference, rewards = _checked(reference, rewards)
    _check_count(n)

    return best_of_n_logprobs(reference.log(), rewards, n).exp()


def soft_best_of_n(reference: Tensor, rewards: Tensor, n: int, beta: float) -> Tensor:
    """The law of soft best-of-n: of `n` samples of the reference one is drawn with probability
    softmax(r / beta). [n] x 2 -> [n], float64.

    `beta` towards 0 gives best-of-n, towards infinity the reference; `n` towards infinity gives the
    tilted law. ConfigError as for `best_of_n`, and for beta that is not positive. Source: Verdun et
    al. 2025, arXiv:2505.03156.

    With w = e^(r / beta) the law is p(y) n E[w(y) / (w(y) + the sum of n - 1 other weights)], and
    1 / x is the integral of e^(-x t): one integral over t instead of a sum over all pools.
    """
    reference, rewards = _checked(reference, rewards)
    _check_count(n)
    _check_positive("beta", beta)

    log_weights = _compressed((rewards - rewards.max()) / beta)
    smallest = float(log_weights[reference > 0].min())
    log_t = torch.arange(-TAIL - math.log(n), TAIL - smallest, STEP, dtype=torch.float64)

    log_share = torch.full_like(log_weights, -torch.inf)
    for points in log_t.split(CHUNK):
        exponents = -torch.exp(points[:, None] + log_weights)  # log e^(-t w), [points, n]
        integrand = points[:, None] + log_weights + exponents
        if n > 1:
            log_transform = torch.logsumexp(reference.log() + exponents, dim=1)
            integrand = integrand + (n - 1) * log_transform[:, None]
        log_share = torch.logaddexp(log_share, torch.logsumexp(integrand, dim=0))

    law = reference * (log_share + math.log(STEP * n)).exp()
    return law / law.sum()


def _compressed(log_weights: Tensor) -> Tensor:
    """The same log-weights with every gap between neighbours cut to TAIL nats.

    A wider gap decides who wins just as surely, and the integral stays short.
    """
    levels, level = torch.unique(log_weights, return_inverse=True)
    gaps = levels.diff().clamp(max=TAIL)
    shortened = torch.cat([levels.new_zeros(1), gaps.cumsum(0)])
    return (shortened - shortened[-1])[level]


def quasi_rejection(
    reference: Tensor, rewards: Tensor, beta: float, bound: float
) -> tuple[Tensor, float]:
    """The law of quasi rejection sampling and the share of samples that it accepts.

    A sample y of the reference is accepted with probability min(1, e^(r / beta) / bound). Accepted
    samples follow p min(e^(r / beta), bound) / Z_bound: the tilted law where `bound` is at least
    the largest e^(r / beta). [n] x 2 -> ([n] float64, acceptance in (0, 1]). ConfigError for beta
    or bound that are not positive. Source: Eikema et al. 2021, arXiv:2112.05702.
    """
    reference, rewards = _checked(reference, rewards)
    _check_positive("beta", beta)
    _check_positive("bound", bound)

    log_accept = (rewards / beta - math.log(bound)).clamp(max=0.0)
    log_joint = reference.log() + log_accept
    return log_joint.softmax(0), float(torch.logsumexp(log_joint, dim=0).exp())


def _checked(reference: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64, after their shapes and values were looked at."""
    check_same_shape(reference=reference, rewards=rewards)
    reference = reference.double()
    rewards = rewards.double()

    if reference.dim() != 1 or not len(reference):
        raise ConfigError(
            f"reference has the shape {list(reference.shape)}; give one probability per outcome, [n]"
        )

    total = float(reference.sum())
    if not bool((reference >= 0).all()) or not abs(total - 1) <= 1e-6:
        raise ConfigError(
            f"reference sums to {total:.6g}; give probabilities that are at least 0 and sum to 1"
        )
    if not bool(rewards.isfinite().all()):
        raise ConfigError("rewards: some are not finite; give a finite reward for every outcome")
    return reference / total, rewards


def _check_count(n: int) -> None:
    if isinstance(n, bool) or n != int(n) or n < 1:
        raise ConfigError(f"n is {n}; give a whole number of samples, at least 1")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value}; give a positive, finite number")
