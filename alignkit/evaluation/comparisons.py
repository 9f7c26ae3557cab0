"""Which objective is better at the same KL, and whether the data say so."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from alignkit.evaluation.frontier import Curve, common_kl, frontier_replicates, score_at
from alignkit.evaluation.statistics import DRAWS, Interval, holm, holm_levels, interval, p_value


@dataclass(frozen=True)
class Comparison:
    """Two frontiers at one KL. `difference` is first - second, its interval's level corrected for the whole family."""

    first: str
    second: str
    kl: float  # nats per completion
    difference: Interval
    p: float
    adjusted_p: float  # Holm

    @property
    def verdict(self) -> str:
        """In words, from the interval."""
        return verdict(self.first, self.second, self.difference, f"at matched KL {self.kl:.2g}")


def verdict(first: str, second: str, difference: Interval, where: str = "") -> str:
    """ "A over B WHERE: +0.031 [0.012, 0.049]" for a difference A - B whose interval excludes 0, else "A and B WHERE: no
    difference shown (+0.004 [-0.010, 0.018])"."""
    place = f" {where}" if where else ""
    if not difference.excludes_zero:
        return f"{first} and {second}{place}: no difference shown ({_signed(difference)})"
    if difference.value < 0:
        first, second = second, first
        difference = Interval(-difference.value, -difference.high, -difference.low, difference.level)
    return f"{first} over {second}{place}: {_signed(difference)}"


def compare_frontiers(
    curves: Sequence[Curve], base: ArrayLike, *, at: float | None = None, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> list[Comparison]:
    """Every pair of `curves` at the KL `at`, or at the largest KL that both reach; one family, corrected by Holm.

    Paired by prompt: all curves and `base` [P] (the reference's score) are measured on the same prompts.
    """
    pairs = list(combinations(range(len(curves)), 2))
    places = [common_kl([curves[i], curves[j]]) if at is None else at for i, j in pairs]
    unique = np.unique(places)
    start = np.asarray(base, dtype=float)
    values = [score_at(*curve.means(), start.mean(), unique) for curve in curves]
    replicates = [frontier_replicates(c, start, unique, draws=draws, seed=seed, stream=i) for i, c in enumerate(curves)]
    where = [int(np.searchsorted(unique, place)) for place in places]
    gaps = [replicates[i][:, g] - replicates[j][:, g] for (i, j), g in zip(pairs, where)]
    p_values = [p_value(gap) for gap in gaps]
    levels, adjusted = holm_levels(p_values, level), holm(p_values)
    return [
        Comparison(
            curves[i].name,
            curves[j].name,
            places[n],
            interval(float(values[i][g] - values[j][g]), gaps[n], level=levels[n]),
            p_values[n],
            adjusted[n],
        )
        for n, ((i, j), g) in enumerate(zip(pairs, where))
    ]


def _signed(found: Interval) -> str:
    return f"{found.value:+.3f} [{found.low:.3f}, {found.high:.3f}]"
