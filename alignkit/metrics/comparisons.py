"""Which objective is better, at the same KL or as it is, and whether the data say so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from alignkit.metrics.frontier import Curve, common_kl, frontier_replicates, score_at
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
    corrected for the family.
    """

    first: str
    second: str
    kl: float | None  # nats per completion; None where KL is not matched
    difference: Interval
    p: float
    adjusted_p: float  # Holm

    @property
    def verdict(self) -> str:
        """In words, from the interval."""
        return verdict(
            self.first,
            self.second,
            self.difference,
            "" if self.kl is None else f"at matched KL {self.kl:.2g}",
        )


def verdict(first: str, second: str, difference: Interval, where: str = "") -> str:
    """ "A over B WHERE: +0.031 [0.012, 0.049]" for a difference A - B whose interval excludes 0, else
     "A and B WHERE: no
    difference shown (+0.004 [-0.010, 0.018])".
    """
    place = f" {where}" if where else ""
    if not difference.excludes_zero:
        return f"{first} and {second}{place}: no difference shown ({_signed(difference)})"
    if difference.value < 0:
        first, second = second, first
        difference = Interval(
            -difference.value, -difference.high, -difference.low, difference.level
        )
    return f"{first} over {second}{place}: {_signed(difference)}"


def compare_frontiers(
    curves: Sequence[Curve],
    base: ArrayLike,
    *,
    at: float | None = None,
    level: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Comparison]:
    """Every pair of `curves` at the KL `at`, or at the largest KL that both reach; one family,
    corrected by Holm.

    Paired by prompt: all curves and `base` [P] (the reference's score) are measured on the same
    prompts.
    """
    pairs = list(combinations(range(len(curves)), 2))
    places = [common_kl([curves[i], curves[j]]) if at is None else at for i, j in pairs]
    unique = np.unique(places)
    start = np.asarray(base, dtype=float)
    values = [score_at(*curve.means(), start.mean(), unique) for curve in curves]
    replicates = [
        frontier_replicates(c, start, unique, draws=draws, seed=seed, stream=i)
        for i, c in enumerate(curves)
    ]
    where = [int(np.searchsorted(unique, place)) for place in places]
    gaps = [replicates[i][:, g] - replicates[j][:, g] for (i, j), g in zip(pairs, where)]
    names = [(curves[i].name, curves[j].name) for i, j in pairs]
    differences = [float(values[i][g] - values[j][g]) for (i, j), g in zip(pairs, where)]
    return _family(names, places, differences, gaps, level)


def compare_means(
    figures: Mapping[str, ArrayLike], *, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> list[Comparison]:
    """Every pair of models by the mean of a figure, name -> [P], paired by prompt; one family,
    corrected by Holm.
    """
    found = {name: np.asarray(values, dtype=float) for name, values in figures.items()}
    names = list(combinations(found, 2))
    gaps = [found[first] - found[second] for first, second in names]
    replicates = [
        weighted_means(gap[None], bootstrap_weights(len(gap), draws=draws, seed=seed))
        for gap in gaps
    ]
    return _family(
        names, [None] * len(names), [float(known_mean(gap)) for gap in gaps], replicates, level
    )


def _family(
    names: Sequence[tuple[str, str]],
    places: Sequence[float | None],
    differences: Sequence[float],
    replicates: Sequence[Array],
    level: float,
) -> list[Comparison]:
    """Comparisons from their bootstrap replicates, corrected together."""
    p_values = [p_value(found) for found in replicates]
    corrected = zip(p_values, holm(p_values), holm_levels(p_values, level))
    return [
        Comparison(*pair, kl, interval(difference, found, level=own), p, adjusted)
        for pair, kl, difference, found, (p, adjusted, own) in zip(
            names, places, differences, replicates, corrected
        )
    ]


def _signed(found: Interval) -> str:
    return f"{found.value:+.3f} [{found.low:.3f}, {found.high:.3f}]"
