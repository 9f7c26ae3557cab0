"""Metrics of several held-out sets, each under its own name."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from alignkit.training.reduction import Metrics

Set = TypeVar("Set")


def metrics_of_sets(measure: Callable[[str, Set], Metrics], sets: Mapping[str, Set]) -> Metrics:
    """`measure` of each name and set, as NAME_metric. One set that has no name stands under "", and
    its metrics keep their names.
    """
    return {
        f"{name}_{metric}" if name else metric: value
        for name, held_out in sets.items()
        for metric, value in measure(name, held_out).items()
    }


def measured_on(measures: Mapping[str, Callable[[], Metrics]]) -> Callable[[], Metrics] | None:
    """One measure of all sets from one of each; None where there are none."""
    return partial(metrics_of_sets, _call, measures) if measures else None


def _call(name: str, measure: Callable[[], Metrics]) -> Metrics:
    return measure()
