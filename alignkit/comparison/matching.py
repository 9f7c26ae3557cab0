"""The runs of `compare.match_kl`: for each objective and each target KL the one that ends there.

The grid's runs are where the search begins; each round adds one strength per target that is still
open (`match_kl` says which), until all targets are reached or given up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from alignkit.comparison.frontiers import setting_of
from alignkit.comparison.grid import Point, at_strength, section_of, strength_field
from alignkit.comparison.match_kl import MOST_OUTSIDE, Step, Tried, next_step
from alignkit.comparison.measurement import Measurement
from alignkit.comparison.run_state import read_run_state
from alignkit.config.recipe import Recipe

if TYPE_CHECKING:
    from alignkit.comparison.measure_run import Measurer

LEAST_KL = 1e-9  # nats; what has less did not move


@dataclass
class Target:
    """One KL that one objective is to end at."""

    label: str
    kl: float
    tries: int = 0  # runs that were made for it
    step: Step = field(default_factory=Step)  # what the last look said

    @property
    def is_open(self) -> bool:
        """Whether another run may be needed."""
        return self.step.reached is None and not self.step.problem


class Search:
    """Looks for the strength of every label at every target, from the runs `points` that there are.

    The caller trains what `next_runs` asks for and adds it to `points`; those in `stale` count for
    nothing. The same runs lead to the same search, so one that was interrupted begins anew and only
    looks up what was trained before.
    """

    def __init__(
        self,
        recipe: Recipe,
        points: Sequence[Point],
        stale: Mapping[str, str],
        measurer: "Measurer",
    ) -> None:
        section = section_of(recipe)
        self.recipe = recipe
        self.points = points
        self.stale = stale
        self.measurer = measurer
        self.in_grid = len(points)
        self.targets = [Target(label, kl) for label in section.grid for kl in section.match_kl]

    def next_runs(self) -> list[Point]:
        """The runs of the next round, one strength for each target that is open; none at the end."""
        tried = {label: self.tried(label) for label in {target.label for target in self.targets}}
        runs: dict[str, Point] = {}
        for target in self.targets:
            if not target.is_open:
                continue
            target.step = next_step(tried[target.label], target.kl, target.tries)
            if target.step.strength is not None:
                target.tries += 1
                asked = at_strength(self.recipe, target.label, target.step.strength)
                runs |= {point.name: point for point in asked}
        return list(runs.values())

    def tried(self, label: str) -> list[Tried]:
        """What the strengths of a label led to: means over seeds and prompts."""
        name = strength_field(self.recipe, label)
        by_strength: dict[float, list[Point]] = {}
        for point in self.points:
            if point.label == label:
                by_strength.setdefault(float(point.swept[name]), []).append(point)
        return [self._tried(name, *each) for each in by_strength.items()]

    def _tried(self, name: str, strength: float, points: Sequence[Point]) -> Tried:
        """One strength over its seeds, with the problem for which it counts for nothing."""
        where = f"at {name}={strength:g}"
        measured = []
        for point in points:
            measurement = self.measurer.read_run(point)
            if point.name in self.stale:
                return Tried(strength, 0.0, f"the run {where} is stale: {self.stale[point.name]}")
            if measurement is None or read_run_state(point).status != "finished":
                reason = read_run_state(point).reason
                return Tried(strength, 0.0, f"the run {where} failed: {reason}")
            measured.append(measurement)

        outside = max(outside_of(measurement) for measurement in measured)
        if outside > MOST_OUTSIDE:
            words = f"{where} {100 * outside:.2g} % of its mass is outside the grammar"
            return Tried(strength, 0.0, words, left_grammar=True)
        kl = float(np.mean([kl_of(measurement) for measurement in measured]))
        if not kl > LEAST_KL:
            return Tried(strength, 0.0, f"{where} it did not leave the base model")
        return Tried(strength, kl)

    def broken(self) -> set[str]:
        """Names of the runs that left the grammar: they stand on no curve and in no verdict."""
        names = set()
        for point in self.points if self.targets else ():
            measurement = self.measurer.read_run(point)
            if measurement is not None and outside_of(measurement) > MOST_OUTSIDE:
                names.add(point.name)
        return names

    def rows(self) -> list[dict[str, Any]]:
        """Each target as JSON: the setting that reached it and its KL, or why none did."""
        rows = []
        for target in self.targets:
            reached = target.step.reached
            rows.append(
                {
                    "label": target.label,
                    "target": target.kl,
                    "setting": self._setting(target.label, reached) if reached else None,
                    "kl": reached.kl if reached else None,
                    "words": target.step.problem,
                }
            )
        return rows

    def _setting(self, label: str, reached: Tried) -> str:
        """The strength in words, as in the other tables."""
        name = strength_field(self.recipe, label)
        own = (point for point in self.points if point.label == label)
        return next(setting_of(one) for one in own if one.swept[name] == reached.strength)

    def price(self) -> list[dict[str, Any]]:
        """What each label cost in all: runs, of which the search asked for some, and CPU seconds."""
        rows = []
        for label in dict.fromkeys(target.label for target in self.targets):
            own = [point for point in self.points if point.label == label]
            rows.append(
                {
                    "label": label,
                    "runs": len(own),
                    "searched": sum(point.label == label for point in self.points[self.in_grid :]),
                    "cpu_seconds": sum(read_run_state(point).cpu_seconds for point in own),
                }
            )
        return rows


def outside_of(measurement: Measurement) -> float:
    """The mean mass outside the task's grammar; 0 where outcomes cannot be listed."""
    return 0.0 if measurement.exact is None else float(np.mean(measurement.exact["outside"]))


def kl_of(measurement: Measurement) -> float:
    """The mean KL to the base model: exact where outcomes can be listed, else of samples."""
    if measurement.exact is not None:
        return float(np.mean(measurement.exact["kl"]))
    return float(np.nanmean(measurement.measured.per_prompt()["kl"]))
