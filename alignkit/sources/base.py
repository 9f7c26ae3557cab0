"""What the training loop asks of a source of data, and what sources that sample share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

from alignkit.batches import Bundle
from alignkit.errors import NumericsError

# What a step learns from: bundles, or of several streams the bundles of each.
Collected = Sequence[Bundle] | Sequence[Sequence[Bundle]]


class Source(Protocol):
    """Where the bundles of an optimiser step come from.

    `metrics` describes the last collection and is logged with the step. `state` goes into
    checkpoints.
    """

    metrics: dict[str, float]

    def collect(self, step: int, half: int) -> Collected:
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


@contextmanager
def explained_numerics() -> Iterator[None]:
    """NumericsError where the policy's log-probs are not finite, with what to do about it."""
    try:
        yield
    except NumericsError as error:
        raise NumericsError(
            f"{error}. The updates before this step went too far: lower train.learning_rate, or go on from an earlier "
            "checkpoint with --resume PATH"
        ) from error
