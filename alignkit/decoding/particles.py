"""One step of a particle sampler: when to resample, whom, and what it says about log Z."""

import math

import torch
from torch import Tensor

from alignkit.errors import ConfigError, NumericsError, ShapeError


def particle_step(
    log_weights: Tensor, uniform: float, *, ess: float
) -> tuple[Tensor, Tensor, float]:
    """Adaptive systematic resampling of the N particles of one prompt.

    With W = softmax(log_weights), particles are resampled where 1 / sum W^2 < ess N: slot j takes
    the first particle i with cumsum(W)_i >= (uniform + j) / N. Then the log-weights are 0 and log_z
    grows by logsumexp(log_weights) - log N. Otherwise nothing changes. A particle of weight 0 is
    never taken.

    log_weights: [N] float64, -inf for a dead particle. uniform: one number in [0, 1). ess: the
    share of effective particles below which to resample, in [0, 1].
    Returns the log-weights [N] that go on, ancestors [N] int64 and the addition to log Z.

    NumericsError where every particle is dead or a weight is not a number; ShapeError, ConfigError
    for arguments out of range. Source: Del Moral et al. 2006 (adaptive resampling); Zhao et al.
    2024, arXiv:2404.17546, for language models.
    """
    if log_weights.dim() != 1 or not len(log_weights):
        raise ShapeError(f"log_weights has the shape {list(log_weights.shape)}; it should be [N]")
    if not 0 <= uniform < 1:
        raise ConfigError(f"uniform is {uniform}; it should be in [0, 1)")
    if not 0 <= ess <= 1:
        raise ConfigError(f"ess is {ess}; it should be in [0, 1]")
    log_weights = log_weights.double()
    if bool((log_weights.isnan() | (log_weights == torch.inf)).any()):
        raise NumericsError("particles: a log-weight is not a number or infinite")
    if bool((log_weights == -torch.inf).all()):
        raise NumericsError(
            "particles: every particle has weight 0, so nothing can go on; use more particles or a "
            "twist that leaves some weight to unfinished text"
        )

    n = len(log_weights)
    shares = log_weights.softmax(0)
    if float(1 / shares.square().sum()) >= ess * n:
        return log_weights, torch.arange(n, device=log_weights.device), 0.0

    # Particles of weight 0 are left out of the search, or a point that falls on 0 would take one.
    alive = (shares > 0).nonzero()[:, 0]
    steps = torch.arange(n, dtype=torch.float64, device=log_weights.device)
    points = (uniform + steps) / n
    places = torch.searchsorted(shares[alive].cumsum(0), points)
    ancestors = alive[places.clamp(max=len(alive) - 1)]

    gained = float(torch.logsumexp(log_weights, dim=0)) - math.log(n)
    return torch.zeros_like(log_weights), ancestors, gained
