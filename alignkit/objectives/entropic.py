"""Entropic risk: the value loss whose minimiser is the certainty equivalent of the return, and the
optimum of an entropic utility with a KL.
"""

import math

import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.objectives.base import tilted
from alignkit.tensors import check_same_shape

LIMIT = 30.0  # beyond it the exponential is continued by its tangent
SERIES_BELOW = 1.0
BISECTIONS = 200
# (e^-x - 1 + x) / x^2 = 1/2! - x/3! + x^2/4! - ...: more terms than float64 can tell apart
SERIES = [(-1) ** k / math.factorial(k + 2) for k in range(18)]


def entropic_value_loss(values: Tensor, returns: Tensor, *, risk: float) -> Tensor:
    """[exp(-a (G - V)) + a (G - V) - 1] / a^2 per token, with a = `risk`: [B, T] x 2 -> [B, T].

    The minimiser is V = -(1 / a) log E exp(-a G). A positive `risk` is averse to spread, a negative
    one seeks it, and -1 / beta gives the soft value beta log E exp(G / beta). Towards 0 it becomes
    half the squared error (`value_loss`). Not masked; the gradient goes into `values` alone.

    Beyond |a (G - V)| = 30 the exponential is continued by its tangent, so that values and
    gradients stay finite. ConfigError for a risk that is 0 or not finite; ShapeError for different
    shapes. Source: the Itakura-Saito loss of arXiv:2505.16925.
    """
    check_same_shape(values=values, returns=returns)
    if risk == 0 or not math.isfinite(risk):
        raise ConfigError(
            f"risk is {risk}; give a finite number other than 0 (value_loss is its limit at 0)"
        )
    gap = returns.detach() - values
    x = risk * gap

    # Near 0 the terms cancel, so a series takes over. Each branch gets an argument that is harmless
    # where the other one counts: a gradient of 0 times infinity would not be a number.
    near = x.abs() < SERIES_BELOW
    x_near = torch.where(near, x, 0.0)
    series = torch.full_like(x_near, SERIES[-1])
    for coefficient in reversed(SERIES[:-1]):
        series = series * x_near + coefficient
    gap_near = torch.where(near, gap, 0.0)

    x_far = torch.where(near, SERIES_BELOW, x)
    inside = x_far.clamp(-LIMIT, LIMIT)
    exponential = torch.exp(-inside) * (1 - (x_far - inside))
    far = (exponential + x_far - 1) / risk / risk if abs(risk) > 1e-18 else torch.zeros_like(x)
    return torch.where(near, gap_near.square() * series, far)


def clipped_entropic_loss(
    values: Tensor, behavior_values: Tensor, returns: Tensor, *, risk: float, clip: float | None
) -> Tensor:
    """`entropic_value_loss`, or that of the values kept within `clip` of `behavior_values` where it
    is larger, as `value_loss` does it: [N, T] x 3 -> [N, T].
    """
    errors = entropic_value_loss(values, returns, risk=risk)
    if clip is None:
        return errors
    behavior_values = behavior_values.detach()
    near = behavior_values + (values - behavior_values).clamp(-clip, clip)
    return torch.maximum(errors, entropic_value_loss(near, returns, risk=risk))


def entropic_optimum(
    reward: Tensor, reference: Tensor, *, beta: float, risk: float
) -> Tensor | None:
    """Log-probs of the policy that maximises -(1 / a) log E exp(-a reward) - beta KL(policy ||
    reference), a = `risk`: rewards and log-probs [..., n] -> [..., n].

    It is ref exp(-x / (a beta u)), normalised, with x = exp(-a reward) and u = E x under the policy
    itself: a root in one number, which is unique for a risk below 0. Above 0 the objective has
    several stationary points: None. At 0 it is `tilted`.
    """
    if risk == 0:
        return tilted(reward, reference, beta)
    if risk > 0:
        return None

    # x is at most 1 where the reward is highest; its scale does not matter, since u has the same.
    x = (-risk * (reward - reward.amax(-1, keepdim=True))).exp()

    def policy(u: Tensor) -> Tensor:
        return (reference - x / (risk * beta * u)).log_softmax(-1)

    low = x.amin(-1, keepdim=True)
    high = x.amax(-1, keepdim=True)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        above = (policy(middle).exp() * x).sum(-1, keepdim=True) > middle
        low = torch.where(above, middle, low)
        high = torch.where(above, high, middle)
    return policy((low + high) / 2)
