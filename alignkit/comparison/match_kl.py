"""The search behind `compare.match_kl`: which strength of an objective ends at a wanted KL.

Pure arithmetic on what was tried so far, so that the same runs always lead to the same next one, and
an interrupted comparison goes on where it stopped. Every run of the search is a whole run of the
comparison: the KL of a shorter one would be another KL. `matching` trains and measures them.

The strength (beta, say) is what holds a policy at its reference: the KL falls as it grows. Near the
reference it falls like strength^-2 (the tilted optimum's second order), and in general log KL is
close to a straight line in log strength.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log

TOLERANCE = 0.1  # of the target
MOST_OUTSIDE = 0.01  # mass outside the task's grammar above which a run is broken
MOST_TRIES = 6  # runs that are made for one target
EDGE = 0.1  # a step inside a bracket stays this share of it away from its ends
STRIDE = 3.0  # the largest factor of a step outwards
FIRST_SLOPE = -2.0  # of log KL in log strength, before two runs tell it
SLOPES = (-4.0, -0.5)  # what two runs close together are believed


@dataclass(frozen=True)
class Tried:
    """What one strength led to: its KL, or the problem for which it counts for nothing."""

    strength: float
    kl: float  # nats per completion, of no meaning where there is a problem
    problem: str = ""
    left_grammar: bool = False  # the problem is that a larger strength may not have


@dataclass(frozen=True)
class Step:
    """What to do next for a target: take the run that `reached` it, train one at `strength`, or
    give up for the `problem`.
    """

    reached: Tried | None = None
    strength: float | None = None
    problem: str = ""


def next_step(tried: Sequence[Tried], target: float, tries: int = 0) -> Step:
    """The next step towards a KL of `target` nats, after `tries` runs that were made for it.

    Broken runs are not measured against the target and no step goes to or beyond them: a strength at
    which the policy leaves the grammar says nothing of the KL that a smaller one would have. Where
    all have left it, the search goes away from them first.
    """
    sound = sorted((one for one in tried if not one.problem), key=lambda one: one.strength)
    broken = [one for one in tried if one.problem]
    if not sound:
        return _retreat(broken, tries)

    nearest = min(sound, key=lambda one: abs(log(one.kl / target)))
    if abs(nearest.kl / target - 1) <= TOLERANCE:
        return Step(reached=nearest)

    strength = float(f"{_proposal(sound, target):.3g}")
    for one in broken:
        beyond = strength <= one.strength < sound[0].strength
        if beyond or one.strength == strength:
            return Step(problem=one.problem)

    if tries >= MOST_TRIES or any(one.strength == strength for one in sound):
        return Step(problem=f"the nearest of its runs ends at {nearest.kl:.2g} nats")
    return Step(strength=strength)


def _retreat(broken: Sequence[Tried], tries: int) -> Step:
    """The step where no run counts: to twice the largest strength at which the grammar was left."""
    if not broken:
        return Step(problem="no run to begin from")
    furthest = max(broken, key=lambda one: one.strength)
    if tries >= MOST_TRIES or not furthest.left_grammar:
        return Step(problem=furthest.problem)
    return Step(strength=float(f"{2 * furthest.strength:.3g}"))


def _proposal(sound: Sequence[Tried], target: float) -> float:
    """The strength at which the straight line in log KL and log strength meets the target."""
    crossing = [
        (one, other)
        for one, other in pairwise(sound)
        if (one.kl - target) * (other.kl - target) < 0
    ]
    if crossing:
        # Kept away from the ends, so that the bracket shrinks however crooked the curve is.
        one, other = crossing[0]
        share = log(one.kl / target) / log(one.kl / other.kl)
        share = min(max(share, EDGE), 1 - EDGE)
        return exp(log(one.strength) + share * log(other.strength / one.strength))

    # All on one side: outwards from the end that is nearer, along the slope of the last two runs.
    near, *further = sound if sound[0].kl < target else sound[::-1]
    slope = FIRST_SLOPE
    if further:
        slope = log(near.kl / further[0].kl) / log(near.strength / further[0].strength)
        slope = min(max(slope, SLOPES[0]), SLOPES[1])
    factor = (target / near.kl) ** (1 / slope)
    return near.strength * min(max(factor, 1 / STRIDE), STRIDE)
