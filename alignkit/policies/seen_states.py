"""Hidden states of an anchor that does not move, for rows that are read twice in one step.

A rollout is read once for its credit, without a gradient, and once for the loss. What statistics
compare the policy with is the same both times.
"""

from collections.abc import Callable

from torch import Tensor

from alignkit.policies.head import AnchorStates
from alignkit.policies.layout import Rows

# Bytes of all states that wait for their second reading; rows beyond them are computed twice.
LIMIT = 64 * 2**20


class SeenStates:
    """The states that wait, each for the rows that it was computed for."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[object, ...], AnchorStates] = {}
        self._bytes = 0

    def of(
        self, name: str, rows: Rows, compute: Callable[[str, Rows], AnchorStates], waits: bool
    ) -> AnchorStates:
        """The states of these rows by the anchor `name`: those that wait, or computed. If `waits`,
        these wait in their turn, where there is room for them.
        """
        key = _identity(name, rows) if waits or self._waiting else ()
        states = self._waiting.pop(key, None)
        if states is not None:
            self._bytes -= states.hidden.nbytes
            return states

        states = compute(name, rows)
        if waits and self._bytes + states.hidden.nbytes <= LIMIT:
            self._waiting[key] = states
            self._bytes += states.hidden.nbytes
        return states

    def clear(self) -> None:
        """Nobody will ask for the states that still wait."""
        self._waiting.clear()
        self._bytes = 0


def _identity(name: str, rows: Rows) -> tuple[object, ...]:
    """What hidden states depend on: the anchor, the tokens, what sees what, and which are read."""
    parts: tuple[Tensor, ...] = (rows.input_ids, rows.position_ids, rows.ends, rows.sources)
    return (name, rows.input_ids.shape, *(part.cpu().numpy().tobytes() for part in parts))
