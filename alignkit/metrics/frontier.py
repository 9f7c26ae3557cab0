"""Reward against KL: what objectives reached, with bands, and on worlds that can be listed the best
that any policy can.

Axes: B settings of one objective (its betas), S seeds, P prompts, R bootstrap replicates, G places
on the KL axis. KL is KL(policy || reference) in nats per completion. The reference itself is the
point (0, its score) of every frontier.

Between two runs a frontier is estimated: the gain over the reference is a straight line in a
coordinate of the KL, the *scale*, in which gains are nearly straight. Where the optimum is known
the scale is the best possible gain at that KL (`OptimalFrontier.scale`), which interpolates the
efficiency; elsewhere it is sqrt(KL) (Gao et al. 2022, arXiv:2210.10760). Below its first run and
beyond its last a frontier says nothing of what a run there would reach: it is drawn towards the
reference and flat, but it is not compared (`spanned_range`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from alignkit.errors import ShapeError
from alignkit.metrics.intervals import (
    DRAWS,
    Array,
    Interval,
    Weights,
    bootstrap_weights,
    interval,
    weighted_means,
)

LEAST_KL = 0.1  # nats; below it efficiency divides noise by noise
BEYOND = 1e-9  # slope of the optimal scale where the optimal gain no longer rises
Scale = Callable[[Array], Array]  # KL [...] -> the coordinate [...] in which gains are straight


def sqrt_scale(kl: Array) -> Array:
    """The square root of the KL [...]: where no optimum is known (Gao et al. 2022)."""
    return np.sqrt(np.maximum(kl, 0.0))


@dataclass(frozen=True)
class Curve:
    """One objective's runs, as means per prompt; a run that failed is nan."""

    name: str
    settings: tuple[str, ...]  # B labels, such as "beta=0.1"
    kl: Array  # [B, S, P]
    score: Array  # [B, S, P]

    def __post_init__(self) -> None:
        for field in ("kl", "score"):
            object.__setattr__(self, field, np.asarray(getattr(self, field), dtype=float))
        shape = self.kl.shape
        if len(shape) != 3 or shape != self.score.shape or len(self.kl) != len(self.settings):
            raise ShapeError(
                f"Curve {self.name}: {len(self.settings)} settings, kl {list(shape)}, "
                f"score {list(self.score.shape)}; both have to be [settings, seeds, prompts]"
            )

    def means(self, weights: Weights | None = None) -> tuple[Array, Array]:
        """KL and score of each setting: [B] each; under bootstrap weights [R, B] each."""
        _, seeds, prompts = self.kl.shape
        used = weights or Weights(
            np.full((1, prompts), 1 / prompts), np.full((1, seeds), 1 / seeds)
        )
        kl = weighted_means(self.kl, used)
        score = weighted_means(self.score, used)
        return (kl[0], score[0]) if weights is None else (kl, score)

    @property
    def span(self) -> tuple[float, float]:
        """The smallest and the largest KL of its runs (means over prompts and seeds)."""
        kl, _ = self.means()
        return float(np.nanmin(kl)), float(np.nanmax(kl))


@dataclass(frozen=True)
class Band:
    """A frontier and its pointwise confidence band at G places."""

    at: Array  # [G] KL
    score: Array  # [G]
    low: Array  # [G]
    high: Array  # [G]
    level: float = 0.95


def score_at(
    kl: ArrayLike, score: ArrayLike, base: ArrayLike, at: ArrayLike, scale: Scale = sqrt_scale
) -> Array:
    """Score of the frontier through the points (`kl`, `score`) [..., B] and (0, `base` [...]) at
    the KLs `at` [G]: [..., G].

    It is a straight line in scale(KL) between neighbouring points, and flat beyond the last.
    Missing points (nan) are left out.
    """
    start = np.asarray(base, dtype=float)[..., None]
    y = np.concatenate([start, np.asarray(score, dtype=float)], -1)  # [..., B + 1]
    x = np.concatenate([np.zeros_like(start), scale(np.asarray(kl, dtype=float))], -1)
    x = np.where(np.isnan(y), np.nan, x)

    # In the order of their KL; missing points come last.
    order = np.argsort(x, axis=-1, kind="stable")
    x = np.take_along_axis(x, order, -1)[..., None, :]
    y = np.take_along_axis(y, order, -1)[..., None, :]

    # The neighbours of every place: the last point at or below it, and the one after that.
    places = scale(np.atleast_1d(np.asarray(at, dtype=float)))[:, None]
    left = (x <= places).sum(-1, keepdims=True) - 1  # [..., G, 1]
    last = (~np.isnan(x)).sum(-1, keepdims=True) - 1
    right = np.minimum(left + 1, last)

    x_left = np.take_along_axis(x, left, -1)[..., 0]
    x_right = np.take_along_axis(x, right, -1)[..., 0]
    y_left = np.take_along_axis(y, left, -1)[..., 0]
    y_right = np.take_along_axis(y, right, -1)[..., 0]
    apart = x_right > x_left
    width = np.where(apart, x_right - x_left, 1.0)
    share = np.where(apart, (places[:, 0] - x_left) / width, 0.0)
    return y_left + share * (y_right - y_left)


def band(
    curve: Curve,
    base: ArrayLike,
    *,
    at: ArrayLike | None = None,
    scale: Scale = sqrt_scale,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Band:
    """The frontier of `curve` with its band; `base` [P]: the reference's score on the same prompts.

    Default places: 101 from 0 to the curve's largest KL.
    """
    kl, score = curve.means()
    start = np.asarray(base, dtype=float)
    places = np.linspace(0, np.nanmax(kl), 101) if at is None else np.atleast_1d(at).astype(float)
    replicates = frontier_replicates(curve, start, places, scale=scale, draws=draws, seed=seed)
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Band(places, score_at(kl, score, start.mean(), places, scale), low, high, level)


def frontier_replicates(
    curve: Curve,
    base: ArrayLike,
    at: ArrayLike,
    *,
    scale: Scale = sqrt_scale,
    draws: int = DRAWS,
    seed: int = 0,
    stream: int = 0,
) -> Array:
    """The frontier at `at` [G] in each bootstrap replicate: [R, G]. Curves on the same prompts
    share the prompts' draws.
    """
    _, seeds, prompts = curve.kl.shape
    weights = bootstrap_weights(prompts, seeds, draws=draws, seed=seed, stream=stream)
    kl, score = curve.means(weights)
    return score_at(kl, score, weights.prompts @ np.asarray(base, dtype=float), at, scale)


def mean_gain(
    curve: Curve,
    base: ArrayLike,
    low: float,
    high: float,
    *,
    scale: Scale = sqrt_scale,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    places: int = 201,
) -> Interval:
    """Mean gain over the reference along the frontier from KL `low` to `high` nats: the area
    between the two, divided by the width; at one place the gain there.

    `base` [P]: the reference's score on the same prompts. Only inside the curve's span does it
    speak of runs.
    """
    at = np.linspace(low, high, places)
    start = np.asarray(base, dtype=float)

    def mean_score(scores: Array) -> Array:
        return ((scores[..., 1:] + scores[..., :-1]) / 2).mean(-1)

    kl, score = curve.means()
    value = mean_score(score_at(kl, score, start.mean(), at, scale)) - start.mean()
    # The base is resampled with the same prompts; its frontier at KL 0 is the base itself.
    with_base = np.concatenate([[0.0], at])
    replicates = frontier_replicates(curve, start, with_base, scale=scale, draws=draws, seed=seed)
    gains = mean_score(replicates[:, 1:]) - replicates[:, 0]
    return interval(float(value), gains, level=level)


class OptimalFrontier:
    """The best mean score that any policy can have at a mean KL to the reference, on a world whose
    n outcomes are listed.

    It is reached by the tilted family reference * exp(reward / beta) / Z with one beta for all
    prompts (one multiplier for the one constraint; Korbak et al. 2022, arXiv:2205.11275); its slope
    is beta.

    reference  [P, n] log-probs
    rewards    [n] or [P, n]
    """

    def __init__(self, reference: ArrayLike, rewards: ArrayLike):
        self.reference = np.asarray(reference, dtype=float)
        self.rewards = np.broadcast_to(np.asarray(rewards, dtype=float), self.reference.shape)
        best = self.rewards == self.rewards.max(-1, keepdims=True)
        self.base_score = float((np.exp(self.reference) * self.rewards).sum(-1).mean())
        self.max_score = float(self.rewards.max(-1).mean())
        # of all mass on the best
        self.max_kl = float(-np.log(np.where(best, np.exp(self.reference), 0).sum(-1)).mean())

    def at_beta(self, beta: ArrayLike) -> tuple[Array, Array]:
        """Mean KL and mean score of the optimum for each `beta` > 0: [...] -> [...] x 2."""
        tilt = self.rewards / np.asarray(beta, dtype=float)[..., None, None]  # [..., P, n]
        weights = self.reference + tilt
        top = weights.max(-1, keepdims=True)
        log_z = top[..., 0] + np.log(np.exp(weights - top).sum(-1))  # [..., P]
        policy = np.exp(weights - log_z[..., None])
        return ((policy * tilt).sum(-1) - log_z).mean(-1), (policy * self.rewards).sum(-1).mean(-1)

    def score_at(self, kl: ArrayLike) -> Array:
        """Best score at each mean `kl` [...]: [...]. Solved for beta by bisection; above `max_kl`
        it is `max_score`.
        """
        wanted = np.asarray(kl, dtype=float)
        # log of 1 / beta
        low = np.full(wanted.shape, -30.0)
        high = np.full(wanted.shape, 30.0)
        for _ in range(80):
            middle = (low + high) / 2
            short = self.at_beta(np.exp(-middle))[0] < wanted
            low = np.where(short, middle, low)
            high = np.where(short, high, middle)
        score = self.at_beta(np.exp(-low))[1]
        return np.where(
            wanted >= self.max_kl, self.max_score, np.where(wanted <= 0, self.base_score, score)
        )

    def curve(self, to: float | None = None, places: int = 101) -> tuple[Array, Array]:
        """KL [places] from 0 to `to` (default: the largest) and the best score there."""
        at = np.linspace(0, self.max_kl if to is None else to, places)
        return at, self.score_at(at)

    def scale(self, places: int = 401) -> Scale:
        """The best possible gain at a KL, as a coordinate of the KL axis.

        A gain that is a straight line in it from the reference on has the same efficiency
        everywhere. The gain is tabulated at `places`, evenly in sqrt(KL), in which it is nearly
        straight, because it is asked for in every bootstrap replicate.
        """
        roots = np.linspace(0, np.sqrt(self.max_kl), places)
        gains = self.score_at(roots**2) - self.base_score

        def best_gain(kl: Array) -> Array:
            # The small slope keeps places beyond the largest KL apart, and in their order.
            return np.interp(sqrt_scale(kl), roots, gains) + BEYOND * kl

        return best_gain


def efficiency(kl: ArrayLike, score: ArrayLike, optimal: OptimalFrontier) -> Array:
    """Gain over the reference divided by the optimal gain at the
    same KL: [...]; nan up to LEAST_KL nats.
    """
    distance = np.asarray(kl, dtype=float)
    known = distance > LEAST_KL
    best = optimal.score_at(np.where(known, distance, 1.0)) - optimal.base_score
    return np.where(known, (np.asarray(score, dtype=float) - optimal.base_score) / best, np.nan)


def spanned_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """The KLs that the runs of all `curves` span: from the largest first run to the smallest last.

    The first number is above the second where there is no such KL.
    """
    firsts, lasts = zip(*(curve.span for curve in curves))
    return max(firsts), min(lasts)


def why_outside(curves: Sequence[Curve], kl: float) -> str:
    """Why the curves cannot all be compared at `kl`: "no run of rpg below 1.2 nats"; empty where
    the runs of all of them span it.
    """
    reasons = []
    for curve in curves:
        first, last = curve.span
        if kl < first:
            reasons.append(f"no run of {curve.name} below {first:.2g} nats")
        if kl > last:
            reasons.append(f"no run of {curve.name} above {last:.2g} nats")
    return ", ".join(reasons)
