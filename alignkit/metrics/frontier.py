"""Reward against KL: what objectives reached, with bands, and on worlds that can be listed the best
that any policy can.

Axes: B settings of one objective (its betas), S seeds, P prompts, G places on the KL axis. KL is
KL(policy || reference) in nats per completion. The reference itself is the point (0, its score) of
every frontier.

Between two points the frontier is a straight line. That is a policy one can have: choosing one of
the two models at random gives the mean of their scores at no more than the mean of their KLs (KL is
convex). Beyond the last point it is flat.
"""

from collections.abc import Sequence
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
        if (
            self.kl.ndim != 3
            or self.kl.shape != self.score.shape
            or len(self.kl) != len(self.settings)
        ):
            raise ShapeError(
                f"Curve {self.name}: {len(self.settings)} settings, kl {list(self.kl.shape)}, score {list(self.score.shape)}; "
                "both have to be [settings, seeds, prompts]"
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


@dataclass(frozen=True)
class Band:
    """A frontier and its pointwise confidence band at G places."""

    at: Array  # [G] KL
    score: Array  # [G]
    low: Array  # [G]
    high: Array  # [G]
    level: float = 0.95


def score_at(kl: ArrayLike, score: ArrayLike, base: ArrayLike, at: ArrayLike) -> Array:
    """Score of the frontier through the points (`kl`, `score`) [..., B] and (0, `base` [...]) at
    the KLs `at` [G]: [..., G].

    Missing points (nan) are left out.
    """
    x, y, start = (np.asarray(values, dtype=float)[..., None] for values in (kl, score, base))
    x, y = (
        np.concatenate([first, rest[..., 0]], -1)
        for first, rest in ((np.zeros_like(start), x), (start, y))
    )
    x = np.where(np.isnan(y), np.nan, x)
    order = np.argsort(x, axis=-1, kind="stable")  # nan come last
    x = np.take_along_axis(x, order, -1)[..., None, :]
    y = np.take_along_axis(y, order, -1)[..., None, :]
    places = np.atleast_1d(np.asarray(at, dtype=float))[:, None]
    left = (x <= places).sum(-1, keepdims=True) - 1  # [..., G, 1]
    right = np.minimum(left + 1, (~np.isnan(x)).sum(-1, keepdims=True) - 1)
    (x0, x1), (y0, y1) = (
        [np.take_along_axis(z, i, -1)[..., 0] for i in (left, right)] for z in (x, y)
    )
    share = np.where(x1 > x0, (places[:, 0] - x0) / np.where(x1 > x0, x1 - x0, 1.0), 0.0)
    return y0 + share * (y1 - y0)


def band(
    curve: Curve,
    base: ArrayLike,
    *,
    at: ArrayLike | None = None,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Band:
    """The frontier of `curve` with its band; `base` [P]: the reference's score on the same prompts.

    Default places: 101 from 0 to the curve's largest KL.
    """
    kl, score = curve.means()
    places = (
        np.linspace(0, np.nanmax(kl), 101)
        if at is None
        else np.atleast_1d(np.asarray(at, dtype=float))
    )
    replicates = frontier_replicates(curve, base, places, draws=draws, seed=seed)
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Band(
        places, score_at(kl, score, np.asarray(base, dtype=float).mean(), places), low, high, level
    )


def frontier_replicates(
    curve: Curve,
    base: ArrayLike,
    at: ArrayLike,
    *,
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
    return score_at(kl, score, weights.prompts @ np.asarray(base, dtype=float), at)


def area(
    curve: Curve,
    base: ArrayLike,
    to: float,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    places: int = 201,
) -> Interval:
    """Mean gain over the reference along the frontier from KL 0 to `to` nats: the area under it,
    divided by `to`.
    """
    at = np.linspace(0, to, places)
    start = np.asarray(base, dtype=float)

    def gain(scores: Array) -> Array:
        return ((scores[..., 1:] + scores[..., :-1]) / 2 - scores[..., :1]).mean(-1)

    kl, score = curve.means()
    value = float(gain(score_at(kl, score, start.mean(), at)))
    return interval(
        value, gain(frontier_replicates(curve, start, at, draws=draws, seed=seed)), level=level
    )


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


def efficiency(kl: ArrayLike, score: ArrayLike, optimal: OptimalFrontier) -> Array:
    """Gain over the reference divided by the optimal gain at the same KL: [...]; nan up to LEAST_KL
    nats.
    """
    found = np.asarray(kl, dtype=float)
    known = found > LEAST_KL
    best = optimal.score_at(np.where(known, found, 1.0)) - optimal.base_score
    return np.where(known, (np.asarray(score, dtype=float) - optimal.base_score) / best, np.nan)


def common_kl(curves: Sequence[Curve]) -> float:
    """The largest KL that all curves reach."""
    return float(min(np.nanmax(curve.means()[0]) for curve in curves))
