"""How one iteration moves the parameters: a gradient step, or an extragradient step.

`backward(bundles)` leaves the step's clipped gradient in the parameters and returns its metrics;
`collect()` gives the bundles of this rank, sampled from the policy as it is when called; of several
streams, the bundles of each.
"""

from collections.abc import Callable
from typing import Any

import torch

from alignkit.policies.pair import PolicyPair

Metrics = dict[str, float]
Collect = Callable[[], Any]
Backward = Callable[[Any], Metrics]


def gradient(
    collect: Collect, backward: Backward, pair: PolicyPair, optimizer: torch.optim.Optimizer
) -> Metrics:
    """One ordinary step."""
    metrics = backward(collect())
    optimizer.step()
    optimizer.zero_grad()
    return metrics


def extragradient(
    collect: Collect, backward: Backward, pair: PolicyPair, optimizer: torch.optim.Optimizer
) -> Metrics:
    """Look ahead one step, sample there, go back, step from the
    original point with the gradient on those samples.

    Zhou et al. 2025, arXiv:2503.08942, section 4: the second gradient is taken at the original
    parameters; only the samples (and with them the opponents) come from the half step. Parameters
    and optimiser state are restored exactly.
    """
    backward(collect())
    with pair.rewound(optimizer):
        optimizer.step()
        optimizer.zero_grad()
        bundles = collect()
    metrics = backward(bundles)
    optimizer.step()
    optimizer.zero_grad()
    return metrics


UPDATES = {"gradient": gradient, "extragradient": extragradient}
