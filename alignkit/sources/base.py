"""What the training loop asks of a source of data."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from alignkit.batches import Bundle


class Source(Protocol):
    """Where the bundles of an optimiser step come from.

    `metrics` describes the last collection and is logged with the step. `state` goes into
    checkpoints.
    """

    metrics: dict[str, float]

    def collect(self, step: int, half: int) -> Sequence[Bundle]:
        """This rank's bundles of optimiser step `step`, counted from 0.

        `half` is 1 for the second collection of an extragradient step, else 0.
        """
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the JSON that `load_state` needs to go on. Called on every rank."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Put back what `state` returned."""
        ...
