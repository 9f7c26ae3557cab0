"""Intervals by the bootstrap over prompts and seeds, and the correction for several comparisons.

Figures are means over prompts (and over seeds where a setting was trained several times), so a
bootstrap replicate is a set of weights: models that are measured on the same prompts share the
prompts' weights, which is what pairs them by prompt. Axes: S seeds, P prompts, R replicates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignkit.errors import ConfigError

DRAWS = 10_000
Array = NDArray[np.float64]
Method = Literal["percentile", "bca"]


@dataclass(frozen=True)
class Interval:
    """A figure and its confidence interval."""

    value: float
    low: float
    high: float
    level: float = 0.95

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Weights:
    """How often each prompt and each seed counts in a replicate; every row sums to 1."""

    prompts: Array  # [R, P]
    seeds: Array  # [R, S]


def bootstrap_weights(
    prompts: int, seeds: int = 1, *, draws: int = DRAWS, seed: int = 0, stream: int = 0
) -> Weights:
    """`draws` resamples of prompts and, independently, of seeds, both with replacement.

    The prompts' weights depend on `seed` alone, the seeds' on `seed` and `stream`: two models
    measured on the same prompts but trained apart take different streams. One prompt says nothing
    about others: its weights are nan.
    """
    if prompts < 1 or seeds < 1 or draws < 1:
        raise ConfigError(
            f"bootstrap: {prompts} prompts, {seeds} seeds, {draws} draws; at least 1 of each"
        )
    by_prompt = np.random.default_rng([seed, 0])
    by_seed = np.random.default_rng([seed, 1, stream])
    drawn = by_prompt.multinomial(prompts, np.full(prompts, 1 / prompts), size=draws) / prompts
    return Weights(
        drawn if prompts > 1 else np.full((draws, 1), np.nan),
        by_seed.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds,
    )


def jackknife_weights(prompts: int, seeds: int = 1) -> Weights:
    """Each prompt left out once, all seeds kept: P replicates, for
    the acceleration of a BCa interval.
    """
    left_out = (1 - np.eye(prompts)) / max(1, prompts - 1)
    return Weights(left_out, np.full((prompts, seeds), 1 / seeds))


def weighted_means(values: ArrayLike, weights: Weights) -> Array:
    """Mean of `values` [..., S, P] under each replicate: [R, ...]. Missing cells (nan) are left out
    of both sums; a replicate that hits none but missing cells is nan.
    """
    cells = np.asarray(values, dtype=float)
    known = ~np.isnan(cells)
    total = _sums(np.where(known, cells, 0.0), weights)
    if known.all():
        return total
    with np.errstate(invalid="ignore"):
        return total / _sums(known.astype(float), weights)


def _sums(values: Array, weights: Weights) -> Array:
    by_prompt = np.tensordot(weights.prompts, values, axes=(1, values.ndim - 1))  # [R, ..., S]
    return np.einsum("r...s,rs->r...", by_prompt, weights.seeds)


def known_mean(values: ArrayLike) -> Array:
    """Mean over the last axis of what is not nan; nan where nothing is known. [..., n] -> [...]."""
    cells = np.asarray(values, dtype=float)
    known = ~np.isnan(cells)
    with np.errstate(invalid="ignore"):
        return np.where(known, cells, 0.0).sum(-1) / known.sum(-1)


def interval(
    value: float, replicates: ArrayLike, *, level: float = 0.95, jackknife: ArrayLike | None = None
) -> Interval:
    """The interval that bootstrap `replicates` [R] give a figure: percentile, or BCa where the
    figure's `jackknife` values [n] are given (Efron 1987: corrected for bias and for a spread that
    changes with the value). Missing replicates (nan) are left out.
    """
    known = np.asarray(replicates, dtype=float)
    known = known[~np.isnan(known)]
    if not len(known):
        return Interval(value, float("nan"), float("nan"), level)

    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if jackknife is not None:
        tails = _bca_tails(value, known, np.asarray(jackknife, dtype=float), tails)
    low, high = np.quantile(known, tails)
    return Interval(value, float(low), float(high), level)


def _bca_tails(value: float, replicates: Array, jackknife: Array, tails: Array) -> Array:
    """The quantiles to read off instead of `tails` (Efron 1987); `tails` themselves where the
    replicates do not vary.
    """
    normal = NormalDist()
    below = ((replicates < value).mean() + (replicates <= value).mean()) / 2
    deviations = jackknife.mean() - jackknife
    spread = (deviations**2).sum()
    if not 0 < below < 1 or spread == 0:
        return tails
    bias = normal.inv_cdf(float(below))
    acceleration = (deviations**3).sum() / (6 * spread**1.5)
    shifted = np.array([bias + normal.inv_cdf(float(tail)) for tail in tails])
    return np.array([normal.cdf(bias + s / (1 - acceleration * s)) for s in shifted])


def mean_interval(
    values: ArrayLike,
    *,
    level: float = 0.95,
    method: Method = "percentile",
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Mean of `values` [P] or [S, P] over prompts and seeds, with its bootstrap interval.

    For a paired difference give the differences.
    """
    cells = np.atleast_2d(np.asarray(values, dtype=float))
    seeds, prompts = cells.shape
    replicates = weighted_means(cells, bootstrap_weights(prompts, seeds, draws=draws, seed=seed))
    jackknife = None
    if method == "bca":
        jackknife = weighted_means(cells, jackknife_weights(prompts, seeds))
    mean = float(known_mean(cells.ravel()))
    return interval(mean, replicates, level=level, jackknife=jackknife)


def standard_error(values: ArrayLike) -> float:
    """Standard error of the mean of `values` [P, K], K samples of each of P prompts.

    The prompts are fixed: only the spread of the samples within a prompt counts. Samples that are
    nan are not known; prompts of which fewer than two are known say nothing, and it is nan where
    none says anything.
    """
    samples = np.asarray(values, dtype=float)
    known = (~np.isnan(samples)).sum(1)
    samples, known = samples[known > 1], known[known > 1]
    if not len(known):
        return float("nan")
    variances = np.nanvar(samples, axis=1, ddof=1) / known  # of each prompt's mean
    return float(np.sqrt(variances.sum()) / len(known))


def sampling_interval(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """The mean of samples [P, K] with the interval of its
    `standard_error`: how exact it is on these very prompts.

    Where the prompts stand for others like them, `mean_interval` of the prompts' means is the wider
    one to quote.
    """
    value = float(np.asarray(values, dtype=float).mean())
    half = NormalDist().inv_cdf((1 + level) / 2) * standard_error(values)
    return Interval(value, value - half, value + half, level)


def wilson(means: ArrayLike, *, level: float = 0.95) -> Interval:
    """Wilson's score interval (1927) of a proportion from the prompts' own means [P] in [0, 1].

    The number of trials is the effective one, p (1 - p) / the variance of the mean: P for one yes
    or no per prompt, more for several or for probabilities; P where the means do not vary.
    """
    proportions = np.asarray(means, dtype=float)
    n = len(proportions)
    p = float(proportions.mean())
    variance = float(proportions.var()) / n
    trials = p * (1 - p) / variance if variance > 0 else float(n)

    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (p + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z * (p * (1 - p) / trials + z**2 / (4 * trials**2)) ** 0.5 / (1 + z**2 / trials)
    return Interval(p, max(0.0, middle - half), min(1.0, middle + half), level)


def p_value(replicates: ArrayLike) -> float:
    """Two-sided p-value of "the true value is 0": twice the share of bootstrap `replicates` [R] on
    the far side of 0, never below 2/R.
    """
    known = np.asarray(replicates, dtype=float)
    known = known[~np.isnan(known)]
    if not len(known):
        return 1.0
    far = min((known <= 0).sum(), (known >= 0).sum())
    return float(min(1.0, 2 * max(far, 1) / len(known)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values [m]: below alpha exactly where Holm's step-down test (1979) at family-wise
    level alpha rejects.
    """
    m = len(p_values)
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (m - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def holm_levels(p_values: Sequence[float], level: float = 0.95) -> list[float]:
    """Confidence level of each comparison's interval such that it excludes 0 where Holm's test at 1
    - `level` rejects.

    The comparison of rank j gets 1 - alpha / (m - j); from the first that is not rejected on, all
    get that one's.
    """
    m = len(p_values)
    levels = [level] * len(p_values)
    alpha = 1 - level
    stopped = None
    for rank, index in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        share = alpha / (m - rank) if stopped is None else stopped
        if p_values[index] > share:
            stopped = share
        levels[index] = 1 - share
    return levels
