"""Which objective is better, at the same KL or as it is, and whether the data say so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from alignkit.metrics.frontier import (
    Curve,
    Scale,
    frontier_replicates,
    score_at,
    spanned_range,
    sqrt_scale,
    why_outside,
)
from alignkit.metrics.intervals import (
    DRAWS,
    Array,
    Interval,
    bootstrap_weights,
    holm,
    holm_levels,
    interval,
    known_mean,
    p_value,
    weighted_means,
)


@dataclass(frozen=True)
class Comparison:
    """Two models, or two frontiers at one KL. `difference` is first - second, its interval's level
    corrected for the family. Two frontiers that cannot be compared have a `reason` instead.
    """

    first: str
    second: str
    kl: float | None  # nats per completion; None where KL is not matched
    difference: Interval | None
    p: float | None
    adjusted_p: float | None  # by Holm
    reason: str = ""  # why there is no difference

    @property
    def verdict(self) -> str:
        """The comparison in words, from the interval."""
        if self.difference is None:
            return f"{self.first} and {self.second}: not comparable, {self.reason}"
        where = "" if self.kl is None else f"at matched KL {self.kl:.2g}"
        return verdict(self.first, self.second, self.difference, where)


def verdict(first: str, second: str, difference: Interval, where: str = "") -> str:
    """The words for a difference first - second.

    "A over B WHERE: +0.031 [0.012, 0.049]" where its interval excludes 0, else
    "A and B WHERE: no difference shown (+0.004 [-0.010, 0.018])".
    """
    place = f" {where}" if where else ""
    if not difference.excludes_zero:
        return f"{first} and {second}{place}: no difference shown ({_signed(difference)})"
    if difference.value > 0:
        return f"{first} over {second}{place}: {_signed(difference)}"
    turned = Interval(-difference.value, -difference.high, -difference.low, difference.level)
    return f"{second} over {first}{place}: {_signed(turned)}"


def compare_frontiers(
    curves: Sequence[Curve],
    base: ArrayLike,
    *,
    at: float | None = None,
    scale: Scale = sqrt_scale,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Comparison]:
    """Every pair of `curves` at the KL `at`, or at the largest KL that both reach; one family,
    corrected by Holm.

    A pair is compared only at a KL that the runs of both span; another pair is part of the result
    with the reason, but not of the family. Between runs a frontier is interpolated in `scale`.
    Paired by prompt: all curves and `base` [P] (the reference's score) are measured on the same
    prompts.
    """
    start = np.asarray(base, dtype=float)
    pairs = list(combinations(range(len(curves)), 2))
    places: dict[tuple[int, int], float] = {}
    reasons: dict[tuple[int, int], str] = {}
    for i, j in pairs:
        both = [curves[i], curves[j]]
        place = spanned_range(both)[1] if at is None else at
        reason = why_outside(both, place)
        if reason:
            reasons[i, j] = reason
        else:
            places[i, j] = place

    # Every frontier once, at all the places where one of the pairs needs it.
    unique = np.unique(list(places.values()))
    scores = [score_at(*curve.means(), start.mean(), unique, scale) for curve in curves]
    replicates = [
        frontier_replicates(curve, start, unique, scale=scale, draws=draws, seed=seed, stream=i)
        for i, curve in enumerate(curves)
    ]
    differences = []
    gaps = []
    for (i, j), place in places.items():
        g = int(np.searchsorted(unique, place))
        differences.append(float(scores[i][g] - scores[j][g]))
        gaps.append(replicates[i][:, g] - replicates[j][:, g])

    names = [(curves[i].name, curves[j].name) for i, j in places]
    compared = _family(names, list(places.values()), differences, gaps, level)
    by_pair = dict(zip(places, compared))
    for (i, j), reason in reasons.items():
        by_pair[i, j] = Comparison(
            curves[i].name, curves[j].name, None, None, None, None, reason=reason
        )
    return [by_pair[pair] for pair in pairs]


def compare_matched(
    runs: Mapping[float, Sequence[Curve]],
    base: ArrayLike,
    *,
    scale: Scale = sqrt_scale,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Comparison]:
    """Every pair of objectives at each KL to which both have a run; one family, corrected by Holm.

    runs: KL -> one curve of one setting for each objective whose run ended near it. A run is
    compared where it really was: its gain at the KL is its own share of `scale` there, which is its
    efficiency where the scale is the best possible gain. Paired by prompt, with `base` [P].
    """
    start = np.asarray(base, dtype=float)
    streams = {
        name: i
        for i, name in enumerate(dict.fromkeys(c.name for own in runs.values() for c in own))
    }

    def gain(kl: Array, score: Array, base_score: Array, at: float) -> Array:
        return (score[..., 0] - base_score) * scale(np.array(at)) / scale(kl[..., 0])

    names = []
    places: list[float] = []
    differences = []
    gaps = []
    for at, curves in runs.items():
        values = [float(gain(*curve.means(), start.mean(), at)) for curve in curves]
        replicates = []
        for curve in curves:
            _, seeds, prompts = curve.kl.shape
            weights = bootstrap_weights(
                prompts, seeds, draws=draws, seed=seed, stream=streams[curve.name]
            )
            replicates.append(gain(*curve.means(weights), weights.prompts @ start, at))

        for i, j in combinations(range(len(curves)), 2):
            names.append((curves[i].name, curves[j].name))
            places.append(at)
            differences.append(values[i] - values[j])
            gaps.append(replicates[i] - replicates[j])
    return _family(names, places, differences, gaps, level)


def compare_means(
    values: Mapping[str, ArrayLike], *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> list[Comparison]:
    """Every pair of models by the mean of one measure, model -> [P], paired by prompt; one family,
    corrected by Holm.
    """
    by_model = {name: np.asarray(measured, dtype=float) for name, measured in values.items()}
    names = list(combinations(by_model, 2))
    gaps = [by_model[first] - by_model[second] for first, second in names]
    differences = [float(known_mean(gap)) for gap in gaps]
    replicates = [
        weighted_means(gap[None], bootstrap_weights(len(gap), draws=draws, seed=seed))
        for gap in gaps
    ]
    return _family(names, [None] * len(names), differences, replicates, level)


def _family(
    names: Sequence[tuple[str, str]],
    places: Sequence[float | None],
    differences: Sequence[float],
    replicates: Sequence[Array],
    level: float,
) -> list[Comparison]:
    """Comparisons from their bootstrap replicates [R] each, corrected together by Holm."""
    p_values = [p_value(draws) for draws in replicates]
    adjusted = holm(p_values)
    levels = holm_levels(p_values, level)
    return [
        Comparison(
            *names[i],
            places[i],
            interval(differences[i], replicates[i], level=levels[i]),
            p_values[i],
            adjusted[i],
        )
        for i in range(len(names))
    ]


def _signed(difference: Interval) -> str:
    return f"{difference.value:+.3f} [{difference.low:.3f}, {difference.high:.3f}]"
