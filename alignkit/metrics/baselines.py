"""What needs no training: best-of-n, and the tilted optimum
estimated from the reference's own samples.

Axes: P prompts, K samples of the reference for each, n outcomes of a world that can be listed.
"""

from dataclasses import dataclass
from math import comb, log

import numpy as np
from numpy.typing import ArrayLike

from alignkit.errors import ConfigError
from alignkit.metrics.intervals import Array


@dataclass(frozen=True)
class Baseline:
    """Score and KL of a policy that nobody trained, per prompt."""

    score: Array  # [P]
    kl: Array  # [P] KL(policy || reference), nats per completion
    effective: Array | None = None  # [P] effective number of samples, if it is sampled with weights


def folklore_kl(n: int) -> float:
    """log n - (n - 1) / n: an upper bound of best-of-n's KL, close to it where no completion is
    likely (Beirami et al. 2024, arXiv:2401.01879).
    """
    return log(n) - (n - 1) / n


def exact_best_of_n(reference: ArrayLike, rewards: ArrayLike, n: int) -> Baseline:
    """Best of `n` samples on a world whose m outcomes can be listed; of equal ones the first.

    `reference`: log-probs [P, m]; `rewards`: [m].

    With F the reference's mass of lower or equal reward, F- of lower, p of equal: an outcome's
    log-ratio to the reference is log[(F^n - F-^n) / p] (Beirami et al. 2024; outcomes of equal
    reward keep their proportions).
    """
    _check(n)
    probs = np.exp(np.asarray(reference, dtype=float))
    reward = np.asarray(rewards, dtype=float)

    # Outcomes of equal reward are one level.
    order = np.argsort(reward, kind="stable")
    levels, starts = np.unique(reward[order], return_index=True)
    mass = np.add.reduceat(probs[:, order], starts, axis=1)  # [P, levels]
    mass = mass / mass.sum(-1, keepdims=True)
    up_to = np.cumsum(mass, -1)
    below = np.concatenate([np.zeros_like(up_to[:, :1]), up_to[:, :-1]], -1)

    # F^n - F-^n = p * sum of F^i F-^(n-1-i), a form without cancellation.
    ratio = sum(up_to**i * below ** (n - 1 - i) for i in range(n))
    chosen = mass * ratio
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.where(chosen > 0, chosen * np.log(ratio), 0.0).sum(-1)
    return Baseline((chosen * levels).sum(-1), kl)


def best_of_n(scores: ArrayLike, logps: ArrayLike, n: int) -> Baseline:
    """Best of `n` out of K >= n samples per prompt: `scores` and the reference's sequence log-probs
    `logps`, [P, K] each.

    The mean over all subsets of n, so unbiased in the score. The KL is the estimator of Beirami et
    al. 2024, which lies between 0 and `folklore_kl(n)`.
    """
    _check(n)
    score = np.asarray(scores, dtype=float)
    k = score.shape[1]
    if n > k:
        raise ConfigError(f"best of {n} needs at least {n} samples per prompt, there are {k}")

    # The i-th lowest is the best of a subset that takes the other n - 1 from the i lower ones.
    order = np.argsort(score, axis=1, kind="stable")
    weights = np.array([comb(i, n - 1) for i in range(k)], dtype=float) / comb(k, n)
    ordered_score = np.take_along_axis(score, order, 1)
    ordered_kl = np.take_along_axis(best_of_n_kl(logps, n), order, 1)
    return Baseline(ordered_score @ weights, ordered_kl @ weights)


def best_of_n_kl(logps: ArrayLike, n: int) -> Array:
    """KL of best-of-n as estimated from the reference log-prob of
    the sample chosen: [...] -> [...].

    Exact for one outcome of probability e on top of a continuum: (1-e)^n [log n + (n-1) log(1-e) -
    (n-1)/n] + (1-(1-e)^n) log[(1-(1-e)^n) / e].
    """
    _check(n)
    log_e = np.minimum(np.asarray(logps, dtype=float), 0.0)
    e = np.exp(log_e)
    with np.errstate(divide="ignore", invalid="ignore"):
        stay = n * np.log1p(-e)  # log (1-e)^n
        first = np.where(e < 1, np.exp(stay) * (folklore_kl(n) + (n - 1) * np.log1p(-e)), 0.0)
        hit = -np.expm1(stay)
        second = np.where(hit > 0, hit * (np.log(hit) - log_e), 0.0)
    return first + second


def tilted_optimum(scores: ArrayLike, beta: float) -> Baseline:
    """The optimum reference * exp(score / beta) / Z, from `scores` [P,
    K] of the reference's samples, self-normalised.

    Score: sum of w s; KL: E_w[s] / beta - log Z with Z the mean of exp(s / beta). `effective` is
    (sum w)^2 / sum w^2 of K: where it is small both figures are too low, at most those of the best
    sample and log K.
    """
    if not beta > 0:
        raise ConfigError(f"tilted optimum: beta is {beta}; it must be above 0")
    sampled = np.asarray(scores, dtype=float)
    tilt = sampled / beta

    # The largest is taken out before the exponential, so that nothing overflows.
    top = tilt.max(-1, keepdims=True)
    weights = np.exp(tilt - top)
    total = weights.sum(-1, keepdims=True)
    log_z = top[:, 0] + np.log(weights.mean(-1))
    weights = weights / total
    score = (weights * sampled).sum(-1)
    return Baseline(score, score / beta - log_z, 1 / (weights**2).sum(-1))


def log_partition_bounds(scores: ArrayLike, beta: float) -> tuple[Array, Array]:
    """Two estimates of log Z, Z = E e^(score / beta) under the reference, from 2n of its samples per
    prompt: `scores` [P, 2n] -> [P] each, the first too low and the second too high in the mean.

    Forward, log of the mean over n samples is too low by Jensen's inequality. Backward, one of the
    n takes part that follows the tilted law, among n - 1 fresh ones, and the log-mean is too high
    (Zhao et al. 2024, arXiv:2404.17546). That one is drawn by its weight among n samples, all of
    which are averaged over, so the upper end itself is approximate where few samples carry the
    weight. Each half serves as either; the means are taken.
    """
    if not beta > 0:
        raise ConfigError(f"log partition: beta is {beta}; it must be above 0")
    tilts = np.asarray(scores, dtype=float) / beta
    n = tilts.shape[1] // 2
    if n < 2:
        raise ConfigError(f"log partition: {tilts.shape[1]} samples per prompt; at least 4")

    low = []
    high = []
    halves = (tilts[:, :n], tilts[:, n : 2 * n])
    for own, other in (halves, halves[::-1]):
        total = np.logaddexp.reduce(own, axis=1)
        low.append(total - log(n))
        fresh = np.logaddexp.reduce(other[:, 1:], axis=1)
        given = np.logaddexp(own, fresh[:, None]) - log(n)
        high.append((np.exp(own - total[:, None]) * given).sum(1))
    return np.mean(low, axis=0), np.mean(high, axis=0)


def _check(n: int) -> None:
    if n < 1:
        raise ConfigError(f"best of n: n is {n}; at least 1")
