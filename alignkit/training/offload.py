"""Optimiser state that waits in the CPU's memory while the model is on an accelerator."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from alignkit.policies.dtensors import local

ROOM = 256 * 2**20  # bytes of parameters that a step moves at once


class Offloaded(torch.optim.Optimizer):
    """An optimiser whose state is in the CPU's memory between its steps.

    A step takes some parameters at a time: their state comes to their device, the rule moves them
    there, and the state goes back. The arithmetic is the rule's own, so no result changes. While a
    checkpoint is read, the whole state is on the device once.

    rule  any optimiser that moves each parameter by its own gradient and state alone
    room  bytes of parameters that are moved at once
    """

    def __init__(self, rule: torch.optim.Optimizer, room: int = ROOM) -> None:
        self.rule = rule
        self.room = room
        super().__init__(rule.param_groups, rule.defaults)
        self._share()

    def _share(self) -> None:
        """The rule's state and groups are this optimiser's."""
        self.state = self.rule.state
        self.param_groups = self.rule.param_groups

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the rule, for the parameters that have a gradient."""
        assert closure is None, "the loop computes gradients itself"
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = {p: p.grad for p in trained}
        try:
            # A rule leaves alone what has no gradient.
            for parameter in trained:
                parameter.grad = None
            for part in self._parts(trained):
                for parameter in part:
                    parameter.grad = gradients[parameter]
                    self._move(parameter, parameter.device)
                self.rule.step()
                for parameter in part:
                    parameter.grad = None
                    self._move(parameter, "cpu")
        finally:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
        return None

    def _parts(self, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Parameters one after the other, as many at once as there is room for."""
        part: list[Tensor] = []
        size = 0
        for parameter in parameters:
            own = local(parameter.detach()).nbytes
            if part and size + own > self.room:
                yield part
                part = []
                size = 0
            part.append(parameter)
            size += own
        if part:
            yield part

    def _move(self, parameter: Tensor, device: torch.device | str) -> None:
        state = self.state.get(parameter, {})
        state.update({k: v.to(device) for k, v in state.items() if isinstance(v, Tensor)})

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Put back what `state_dict` gave."""
        self.rule.load_state_dict(dict(state_dict))
        self._share()
        for parameter in self.state:
            self._move(parameter, "cpu")
