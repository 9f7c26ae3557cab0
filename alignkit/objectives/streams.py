"""Several objectives at once, each on rows of its own: the streams of a run."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import FAMILIES
from alignkit.errors import ConfigError
from alignkit.objectives.base import Objective, State
from alignkit.plan import Plan

FLOOR = 0.01  # of a stream's largest signal: the least that its mean is taken to be


@dataclass(frozen=True)
class Stream:
    """One of the objectives, and its weight in the loss of the run."""

    name: str
    objective: Objective
    weight: float  # the weights of all streams add up to 1


class Streams(Objective):
    """The sum of weight * loss of several objectives, each divided by the counts of its own rows.

    Unlike the parts of a `Weighted` list they see different rows, and have plans that differ. The
    loop serves each stream's own plan; `plan` is what the models have to bring for all of them.
    """

    streams: Sequence[Stream]

    @property
    def plan(self) -> Plan:
        plans = [stream.objective.plan for stream in self.streams]
        for plan, stream in zip(plans, self.streams):
            if plan.outputs or plan.rewards:
                raise ConfigError(
                    f"data.train: stream `{stream.name}` trains a model of rewards or preferences; give "
                    "it a run of its own"
                )
        needs = {field.name: NEEDS[field.name](plans) for field in fields(Plan)}
        return Plan(**needs)


def _agreed(name: str) -> Callable[[Sequence[Plan]], Any]:
    def agreed(plans: Sequence[Plan]) -> Any:
        values = [getattr(plan, name) for plan in plans]
        if any(value != values[0] for value in values):
            raise ConfigError(
                f"data.train: the objectives of the streams disagree on `{name}`; give each its own run"
            )
        return values[0]

    return agreed


def _any(name: str) -> Callable[[Sequence[Plan]], bool]:
    return lambda plans: any(getattr(plan, name) for plan in plans)


def _largest(name: str) -> Callable[[Sequence[Plan]], int]:
    return lambda plans: max(getattr(plan, name) for plan in plans)


def _bins(plans: Sequence[Plan]) -> int:
    sizes = {plan.bins for plan in plans if plan.bins}
    if len(sizes) > 1:
        raise ConfigError(
            "data.train: the objectives of two streams cut the reward into different bins; give each "
            "its own run"
        )
    return max(sizes, default=0)


def _family(plans: Sequence[Plan]) -> str:
    """One that is sampled where any is: the reference's log-probs cannot be stored then."""
    return next((plan.data for plan in plans if FAMILIES[plan.data].sampled), plans[0].data)


def _anchors(plans: Sequence[Plan]) -> tuple[str, ...]:
    """Those of all streams. The reference comes first where a stream reads its whole laws."""
    read = {plan.read_by_statistics for plan in plans} - {None}
    first = sorted(name for name in read if name is not None)  # "reference" before "teacher"
    return tuple(dict.fromkeys([*first, *(name for plan in plans for name in plan.anchors)]))


def _numbered(entries: Iterable[tuple[int, str, Any]]) -> dict[str, Any]:
    return {f"{number}.{name}": value for number, name, value in entries}


def _statistics(plans: Sequence[Plan]) -> dict[str, Any]:
    """Each stream's under names of its own: nobody calls them by these."""
    return _numbered(
        (i, name, f) for i, plan in enumerate(plans) for name, f in plan.statistics.items()
    )


def _without_anchor(plans: Sequence[Plan]) -> tuple[str, ...]:
    return tuple(f"{i}.{name}" for i, plan in enumerate(plans) for name in plan.without_anchor)


def _feedback(plans: Sequence[Plan]) -> str:
    return next((plan.feedback for plan in plans if plan.feedback != "none"), "none")


# What the models bring where several plans are served: for each field of a plan.
NEEDS: dict[str, Callable[[Sequence[Plan]], Any]] = {
    "data": _family,
    "statistics": _statistics,
    "without_anchor": _without_anchor,
    "anchors": _anchors,
    "samples": lambda plans: tuple(draw for plan in plans for draw in plan.samples),
    "feedback": _feedback,
    "values": _any("values"),
    "rewards": _any("rewards"),
    "partition": _any("partition"),
    "bins": _bins,
    "epochs": _largest("epochs"),
    "minibatches": _largest("minibatches"),
    "credit_reads_policy": _any("credit_reads_policy"),
    "coupled": _any("coupled"),
    "mismatched": _any("mismatched"),
    "update": _agreed("update"),
    "outputs": _largest("outputs"),
    "prefixes": lambda plans: {k: v for plan in plans for k, v in plan.prefixes.items()},
    "joined": _any("joined"),
}


@dataclass(frozen=True)
class Reweigh:
    """Factors of the streams' weights that follow one signal of each, its loss or its reward: those
    that have stopped moving or that jump about get more.

    With the means m of the last `window` signals and m' of the `window` before, convergence is
    c = m / m', instability i = std / m over the last window, and the factors of D streams are
    D softmax((c + i) / temperature); 1 until there are two windows. A factor of a signal changes
    nothing. After RECAP, arXiv:2510.21978, whose exact signals could not be seen: that these are
    the published ones is a hypothesis.
    """

    window: int = 10
    temperature: float = 1.0

    def init_state(self, streams: int) -> State:
        """Signals of two windows [D, 2 window], float64; NaN where none has been seen."""
        return {"signals": torch.full((streams, 2 * self.window), torch.nan, dtype=torch.float64)}

    def observe(self, state: State, signals: Sequence[float]) -> State:
        """The state with one more signal of each stream behind the others."""
        newest = torch.tensor(signals, dtype=torch.float64).unsqueeze(-1)
        return {"signals": torch.cat([state["signals"][:, 1:], newest], -1)}

    def factors(self, state: State) -> Tensor:
        """[D], with the sum D."""
        signals = state["signals"]
        if not signals.isfinite().all():
            return torch.ones(len(signals), dtype=torch.float64)

        before, last = signals.unflatten(-1, (2, self.window)).unbind(1)
        # Losses of RL hover at 0, where a ratio of means says nothing.
        floor = FLOOR * signals.abs().amax(-1).clamp(min=torch.finfo(signals.dtype).tiny)
        size = torch.maximum(last.mean(-1).abs(), floor)
        convergence = size / torch.maximum(before.mean(-1).abs(), floor)
        instability = last.std(-1, correction=0) / size
        together = (convergence + instability) / self.temperature
        return len(signals) * together.softmax(-1)
