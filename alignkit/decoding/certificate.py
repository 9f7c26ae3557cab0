"""What a particle sampler's own random numbers say about the KL of its output."""

import math

import torch
from torch import Tensor


def kl_interval(tilts: Tensor, log_z: Tensor, conditional: Tensor) -> tuple[Tensor, Tensor]:
    """A lower and an upper estimate of log q(y) / p(y) for each output y: their means enclose
    KL(q || p).

    tilts [...]: r(y) / beta of the outputs. log_z [...]: log Zhat of the runs that wrote them.
    conditional [M, ...]: log Zhat of M fresh runs that are conditional on y. Returns low, high
    [...]; with M = 0 low is -inf and high the certificate r / beta - log Zhat.

    q(y) = p(y) e^(r / beta) E[1 / Zhat | y], the mean over conditional runs. Fresh ones alone give
    a log-mean that is too low; the run that wrote y is drawn with a probability that favours a
    small Zhat, and with it among them the log-mean is too high. No normaliser is needed. Both come
    closer with M. KL(q || p) <= E[r / beta] - E[log Zhat] is the data-processing inequality.
    """
    count = len(conditional)
    every = torch.cat([conditional, log_z[None]])
    high = tilts + torch.logsumexp(-every, dim=0) - math.log(count + 1)
    if not count:
        return torch.full_like(high, -torch.inf), high
    return tilts + torch.logsumexp(-conditional, dim=0) - math.log(count), high
