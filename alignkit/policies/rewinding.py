"""Steps that are taken to see where they lead, and then undone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.policies.dtensors import cloned


@contextmanager
def rewound(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Take steps inside the block that are undone at its end.

    Parameters and optimiser state are then bit for bit what they were; state that did not exist is
    deleted. Random number generators are left alone.
    """
    weights = [p.detach().clone() for p in parameters]
    state: dict[Tensor, Any] = {
        p: cloned(optimizer.state[p]) for p in parameters if p in optimizer.state
    }
    settings = [
        {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
    ]

    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights):
                parameter.copy_(weight)
        for parameter in parameters:
            optimizer.state.pop(parameter, None)
        optimizer.state.update(state)
        for group, earlier in zip(optimizer.param_groups, settings):
            group.update(earlier)
