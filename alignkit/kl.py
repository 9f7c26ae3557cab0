"""KL estimators, and what the gradient of each one is.

`log_ratio` is always log policy - log reference of a sampled token or sequence. With y drawn from
the policy its mean is the reverse KL, KL(policy || reference) ("mode seeking"); the forward KL is
KL(reference || policy) ("mass covering"). A value that is right in the mean does not make a
gradient that is right in the mean, so each docstring gives both (expectations over y from the
policy; with `log_importance` = log policy - log behavior, over y from the behaviour policy).

Definitions: Schulman 2020, "Approximating KL divergence". Gradients: Tang & Munos 2025,
arXiv:2506.09477; "A comedy of estimators", arXiv:2512.21852; Zhang et al. 2025, arXiv:2505.17508.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.tensors import check_same_shape

LOG_RATIO_LIMIT = 20.0  # exp(20) = 4.9e8 and its square are finite in float32
Direction = Literal["reverse", "forward"]


def clamp_log_ratio(log_ratio: Tensor) -> Tensor:
    """`log_ratio` limited to +-20 in value, with the gradient of the identity: [...] -> [...].

    Every exponential of a log-ratio goes through this clamp. Clamping the estimator's value instead
    would set the gradient to zero exactly where the policy has drifted most, and give nan where the
    exponential overflowed.
    """
    return log_ratio + (log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT) - log_ratio).detach()


def importance(policy_logps: Tensor, behavior_logps: Tensor) -> Tensor:
    """exp(policy - behavior) under `clamp_log_ratio`: [...] x 2 -> [...].

    Mean 1 over y from the behaviour policy.
    """
    check_same_shape(policy_logps=policy_logps, behavior_logps=behavior_logps)
    return clamp_log_ratio(policy_logps - behavior_logps).exp()


def k1(log_ratio: Tensor) -> Tensor:
    """The log-ratio itself: [...] -> [...]. Mean: the reverse KL. Gradient as a loss: 0 in the
    mean, pure noise.

    In the reward (detached, times the score function) its gradient is the reverse KL's.
    """
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """log_ratio^2 / 2: [...] -> [...].

    Mean: biased, right to second order. Gradient as a loss: the reverse KL's.
    """
    return 0.5 * log_ratio**2


def k3(log_ratio: Tensor) -> Tensor:
    """exp(-log_ratio) - 1 + log_ratio >= 0: [...] -> [...]. Mean: the reverse KL. Gradient as a
    loss: the FORWARD KL's.

    The log-ratio is clamped at -20 from below (`clamp_log_ratio`); near 0 a series replaces the
    cancelling difference, so that the value is never negative.
    """
    above = log_ratio + (log_ratio.clamp(min=-LOG_RATIO_LIMIT) - log_ratio).detach()
    small = above.abs() < 0.02
    a = torch.where(small, above, above.new_zeros(()))
    series = 0.5 * a**2 * (1 - a / 3 * (1 - a / 4 * (1 - a / 5 * (1 - a / 6 * (1 - a / 7)))))
    return torch.where(small, series, torch.expm1(-above) + above)


def k3_forward(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio) - 1 - log_ratio >= 0: [...] -> [...], for y drawn from the REFERENCE.

    Mean and gradient: the forward KL's.
    """
    return k3(-log_ratio)


def k1_weighted(log_ratio: Tensor, log_importance: Tensor) -> Tensor:
    """importance * k1 with the gradient through both: [...] x 2 -> [...].

    Mean and gradient: the reverse KL's.
    """
    check_same_shape(log_ratio=log_ratio, log_importance=log_importance)
    return clamp_log_ratio(log_importance).exp() * log_ratio


def k2_weighted(log_ratio: Tensor, log_importance: Tensor) -> Tensor:
    """stopped importance * k2: [...] x 2 -> [...].

    Mean: biased. Gradient: the reverse KL's, off-policy too.
    """
    check_same_shape(log_ratio=log_ratio, log_importance=log_importance)
    return clamp_log_ratio(log_importance).exp().detach() * k2(log_ratio)


def k3_weighted(log_ratio: Tensor, log_importance: Tensor) -> Tensor:
    """importance * k3 with the gradient through both: [...] x 2 -> [...].

    Mean and gradient: the reverse KL's.
    """
    check_same_shape(log_ratio=log_ratio, log_importance=log_importance)
    return clamp_log_ratio(log_importance).exp() * k3(log_ratio)


def k3_stopped(log_ratio: Tensor, log_importance: Tensor) -> Tensor:
    """stopped importance * k3: [...] x 2 -> [...]. Mean: the reverse KL. Gradient: the FORWARD
    KL's, off-policy too.
    """
    check_same_shape(log_ratio=log_ratio, log_importance=log_importance)
    return clamp_log_ratio(log_importance).exp().detach() * k3(log_ratio)


def straight_through(log_ratio: Tensor, value: Callable[[Tensor], Tensor] = k3) -> Tensor:
    """The value of `value` (k1 or k3) with the gradient of k2: [...] -> [...]. Mean and gradient:
    the reverse KL's.
    """
    carrier = k2(log_ratio)
    return carrier + (value(log_ratio) - carrier).detach()


def exact(
    policy_logprobs: Tensor, reference_logprobs: Tensor, direction: Direction = "reverse"
) -> Tensor:
    """KL between two distributions given by log-probs over the last axis: [..., V] x 2 -> [...].

    "reverse" is KL(policy || reference), "forward" KL(reference || policy). Value and gradient are
    exact for one decision; over a sequence the sum over sampled prefixes has an unbiased value, and
    its gradient keeps the prefix distribution fixed (partial: no credit for divergence that a token
    causes later). Entries of zero probability add nothing, masked logits (-inf) in both included;
    the result is infinite where the first distribution has mass and the second has none.
    """
    check_same_shape(policy_logprobs=policy_logprobs, reference_logprobs=reference_logprobs)
    if direction not in ("reverse", "forward"):
        raise ConfigError(
            f"kl.exact: direction is {direction!r}; it must be 'reverse' or 'forward'"
        )
    if direction == "reverse":
        first = policy_logprobs
        second = reference_logprobs
    else:
        first = reference_logprobs
        second = policy_logprobs

    live = first > -torch.inf
    log_p = torch.where(live, first, first.new_zeros(()))
    log_q = torch.where(live, second, second.new_zeros(()))
    return torch.where(live, log_p.exp() * (log_p - log_q), first.new_zeros(())).sum(-1)


# name -> penalty per token from (log_ratio, log_importance), and what its gradient as a loss is
# on-policy
LOSS_ESTIMATORS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Direction]] = {
    "k2": (k2_weighted, "reverse"),
    "k3": (lambda log_ratio, _: k3(log_ratio), "forward"),
    "k3_stopped": (k3_stopped, "forward"),
    "k1_weighted": (k1_weighted, "reverse"),
    "k3_weighted": (k3_weighted, "reverse"),
    "k3_straight_through": (lambda log_ratio, _: straight_through(log_ratio), "reverse"),
}
