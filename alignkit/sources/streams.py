"""The bundles of a step that learns from several streams, each from a source of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from alignkit.batches import Bundle
from alignkit.objectives.base import State
from alignkit.objectives.streams import Reweigh, Stream
from alignkit.sources.base import Source


@dataclass
class StreamSource:
    """The sources of all streams, and the weights of their losses.

    The weights are those of the streams, times factors that follow the streams' signals where there
    is a `reweigh`: the mean reward of a stream that is rewarded, else its loss.
    """

    streams: Sequence[Stream]
    sources: Sequence[Source]
    reweigh: Reweigh | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reweigh_state: State = {}
        # The last ones: a rollout is measured once, also if a run is resumed in the middle of it.
        self.signals: dict[str, float] = {}
        if self.reweigh is not None:
            self.reweigh_state = self.reweigh.init_state(len(self.streams))

    def collect(self, step: int, half: int = 0) -> list[Sequence[Bundle]]:
        """This rank's bundles of each stream."""
        parts: list[Any] = [source.collect(step, half) for source in self.sources]
        self.metrics = {
            f"{stream.name}/{metric}": value
            for stream, source in zip(self.streams, self.sources)
            for metric, value in source.metrics.items()
        }
        return parts

    def weights(self) -> list[float]:
        """The weight of each stream's loss in the next step."""
        own = [stream.weight for stream in self.streams]
        if self.reweigh is None:
            return own
        factors = self.reweigh.factors(self.reweigh_state).tolist()
        return [weight * factor for weight, factor in zip(own, factors)]

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Take up the signals of a step's metrics, the same on all ranks. A step that was skipped
        has none.
        """
        if self.reweigh is None or "loss" not in metrics:
            return
        for stream in self.streams:
            signal = self._signal(stream)
            if signal in metrics:
                self.signals[stream.name] = metrics[signal]
        if len(self.signals) == len(self.streams):
            newest = [self.signals[stream.name] for stream in self.streams]
            self.reweigh_state = self.reweigh.observe(self.reweigh_state, newest)

    def _signal(self, stream: Stream) -> str:
        rewarded = stream.objective.plan.feedback == "reward"
        return f"{stream.name}/{'reward' if rewarded else 'loss'}"

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the sources have to keep, and the signals of the weights."""
        tensors = {f"reweigh.{name}": value for name, value in self.reweigh_state.items()}
        state: dict[str, Any] = {"signals": self.signals}
        for number, source in enumerate(self.sources):
            own, state[str(number)] = source.state()
            tensors |= {f"{number}.{name}": value for name, value in own.items()}
        return tensors, state

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Put back what `state` returned."""
        self.reweigh_state = _inside("reweigh", tensors)
        self.signals = dict(state["signals"])
        for number, source in enumerate(self.sources):
            source.load_state(_inside(str(number), tensors), state[str(number)])


def _inside(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one part, without its name before theirs."""
    prefix = f"{part}."
    return {k.removeprefix(prefix): tensors[k] for k in tensors if k.startswith(prefix)}
