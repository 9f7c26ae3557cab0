"""Resampling of particles: when, whom, and what it says about log Z.

Axes: R independent runs, N particles of each.
"""

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

    steps = torch.arange(len(log_weights), dtype=torch.float64, device=log_weights.device)
    points = (uniform + steps) / len(log_weights)
    weights, ancestors, gained = _resampled(log_weights.double()[None], points[None], ess)
    return weights[0], ancestors[0], float(gained)


def resampled(
    log_weights: Tensor, uniforms: Tensor, *, ess: float, keep_first: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Adaptive systematic resampling of many runs, with the slots turned by a random number of
    places: slot j takes the particle at the point frac(uniform + j / N) of the cumulated weights.

    log_weights [R, N] float64, uniforms [R] in [0, 1) -> log-weights [R, N] that go on, ancestors
    [R, N] int64 and the additions to log Z [R].

    Turned like this every slot takes particle i with probability W_i, and nothing tells one slot
    from another. That is what conditional runs need: with `keep_first` slot 0 takes particle 0, its
    point being uniform among those that do, and the other slots follow from it. So the law of
    everything else is the one given that slot 0 descends from particle 0 (Andrieu et al. 2010, with
    this scheme in the place of the multinomial one; the tests enumerate it). NumericsError as for
    `particle_step`.
    """
    n = log_weights.shape[1]
    log_weights = log_weights.double()
    first = uniforms.double()
    if keep_first:
        first = first * log_weights.softmax(1)[:, 0]

    steps = torch.arange(n, dtype=torch.float64, device=log_weights.device) / n
    points = (first[:, None] + steps).remainder(1.0)
    return _resampled(log_weights, points, ess)


def _resampled(log_weights: Tensor, points: Tensor, ess: float) -> tuple[Tensor, Tensor, Tensor]:
    """Resampling at the points [R, N] in [0, 1) where too few particles are effective."""
    check_alive(log_weights)
    n = log_weights.shape[1]
    shares = log_weights.softmax(1)
    due = 1 / shares.square().sum(1) < ess * n  # [R]

    # A particle of weight 0 has no place between two sums, so that no point falls on it; rounding
    # may leave the last point beyond the last sum, where the last living particle takes it.
    sums = shares.cumsum(1)
    last = n - 1 - (shares > 0).flip(1).int().argmax(1)  # [R]
    places = torch.searchsorted(sums, points.contiguous(), right=True)
    ancestors = torch.minimum(places, last[:, None])

    own = torch.arange(n, device=log_weights.device).expand_as(ancestors)
    gained = torch.logsumexp(log_weights, dim=1) - math.log(n)
    return (
        torch.where(due[:, None], torch.zeros_like(log_weights), log_weights),
        torch.where(due[:, None], ancestors, own),
        torch.where(due, gained, torch.zeros_like(gained)),
    )


def check_alive(log_weights: Tensor) -> None:
    """NumericsError where a weight of [R, N] is not a number, or all of one run are 0."""
    if bool((log_weights.isnan() | (log_weights == torch.inf)).any()):
        raise NumericsError("particles: a log-weight is not a number or infinite")
    if bool((log_weights == -torch.inf).all(1).any()):
        raise NumericsError(
            "particles: every particle has weight 0, so nothing can go on; use more particles or a "
            "twist that leaves some weight to unfinished text"
        )
