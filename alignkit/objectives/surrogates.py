"""Policy-gradient surrogates per token or sequence: PPO's
clip, RPG's four divergences, the value loss.

Gradients flow into the policy's log-probs and values alone; behaviour, advantages and returns are
constants.
"""

from typing import Literal

import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.kl import LOSS_ESTIMATORS, clamp_log_ratio, importance
from alignkit.tensors import check_same_shape, masked_mean

Divergence = Literal["forward_kl", "reverse_kl", "forward_ukl", "reverse_ukl"]
Estimator = Literal["differentiable", "reinforce"]
KLEstimator = Literal["k2", "k3", "k3_stopped", "k1_weighted", "k3_weighted", "k3_straight_through"]


def ppo_loss(
    policy_logps: Tensor,
    behavior_logps: Tensor,
    advantages: Tensor,
    *,
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """Clipped surrogate per token or sequence: [...] x 3 -> [...]. w
    = exp(policy - behavior), see `kl.importance`.

    max(-w A, -clip(w, 1 - clip_low, 1 + clip_high) A); where A < 0, at most -dual_clip A. None
    switches a bound off. Schulman et al. 2017, arXiv:1707.06347, eq. 7; dual clip: Ye et al. 2020,
    arXiv:1912.09729, eq. 5.
    """
    check_same_shape(
        policy_logps=policy_logps, behavior_logps=behavior_logps, advantages=advantages
    )
    ratio = importance(policy_logps, behavior_logps.detach())
    advantages = advantages.detach()
    low = None if clip_low is None else 1 - clip_low
    high = None if clip_high is None else 1 + clip_high
    clipped = ratio if low is None and high is None else ratio.clamp(low, high)
    loss = torch.maximum(-ratio * advantages, -clipped * advantages)
    if dual_clip is None:
        return loss
    bounded = torch.minimum(loss, -dual_clip * advantages)
    return torch.where(advantages < 0, bounded, loss)


def grpo_loss(
    policy_logps: Tensor,
    behavior_logps: Tensor,
    reference_logps: Tensor,
    advantages: Tensor,
    *,
    beta: float | Tensor,
    kl: KLEstimator = "k3_weighted",
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Clipped surrogate + beta * KL estimate per token: [N, T] x 4 -> [N, T]. `beta` is one number,
    or one per token [N, T].

    With a `mask` [N, T] the importance ratio of a token is the geometric mean over the tokens of its
    completion; it gets the gradient of its own ratio, and so its own credit (GSPO-token, Zheng et
    al. 2025, arXiv:2507.18071, section 4.3). A weighted KL then has that mean as its weight.

    What the penalty's gradient is depends on `kl` (`alignkit.kl`): k3, as published, is the forward
    KL's; k3_weighted the reverse KL's. Shao et al. 2024, arXiv:2402.03300, eq. 3; weighted:
    DeepSeek-V3.2, arXiv:2512.02556.
    """
    check_same_shape(policy_logps=policy_logps, reference_logps=reference_logps)
    own = policy_logps
    whole = policy_logps
    sampled = behavior_logps.detach()
    if mask is not None:
        whole = shared_mean(policy_logps, mask)
        sampled = shared_mean(sampled, mask)
        own = policy_logps + (whole - policy_logps).detach()

    surrogate = ppo_loss(
        own,
        sampled,
        advantages,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
    estimate = LOSS_ESTIMATORS[kl][0]
    log_ratio = policy_logps - reference_logps.detach()
    return surrogate + beta * estimate(log_ratio, whole - sampled)


def shared_mean(logps: Tensor, mask: Tensor) -> Tensor:
    """The mean over the tokens of a completion, at each of its places: [N, T] x 2 -> [N, T]."""
    return masked_mean(logps, mask).unsqueeze(-1).expand_as(logps)


def value_loss(
    values: Tensor, behavior_values: Tensor, returns: Tensor, *, clip: float | None = None
) -> Tensor:
    """0.5 max((V - G)^2, (clip(V, V_old - clip, V_old + clip) -
    G)^2) per token: [...] x 3 -> [...].

    `behavior_values`: the value head's at rollout time. Without `clip`, 0.5 (V - G)^2.
    """
    check_same_shape(values=values, behavior_values=behavior_values, returns=returns)
    behavior_values = behavior_values.detach()
    returns = returns.detach()
    error = (values - returns) ** 2
    if clip is None:
        return 0.5 * error
    near = behavior_values + (values - behavior_values).clamp(-clip, clip)
    return 0.5 * torch.maximum(error, (near - returns) ** 2)


def rpg_weights(
    policy_logps: Tensor,
    behavior_logps: Tensor,
    advantages: Tensor,
    *,
    beta: float,
    divergence: Divergence = "reverse_ukl",
) -> Tensor:
    """What the gradient of log policy is multiplied by in `rpg_loss`, up to the sign: w times the
    advantage, the KL inside. [...] x 3 -> [...], without gradient.

    Zhang et al. 2025, arXiv:2505.17508, tables 1, 2 and 4.
    """
    log_w = clamp_log_ratio(policy_logps - behavior_logps).detach()
    w = log_w.exp()
    of_divergence = {
        "forward_kl": torch.ones_like(w),
        "reverse_kl": -w * (log_w + 1),
        "forward_ukl": 1 - w,
        "reverse_ukl": -w * log_w,
    }
    if divergence not in of_divergence:
        raise ConfigError(
            f"rpg_loss: divergence is {divergence!r}; allowed are {', '.join(of_divergence)}"
        )
    return w * advantages.detach() + beta * of_divergence[divergence]


def rpg_loss(
    policy_logps: Tensor,
    behavior_logps: Tensor,
    advantages: Tensor,
    *,
    beta: float,
    divergence: Divergence = "reverse_ukl",
    estimator: Estimator = "reinforce",
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    mass: float = 1.0,
) -> Tensor:
    """Loss per sequence or token whose mean gradient is
    -grad(E_policy[R] - beta D): [...] x 3 -> [...].

    D is KL(behavior || policy) ("forward") or KL(policy || behavior) ("reverse"), normalised or not
    ("ukl"); `mass` is the sum of exp(behavior_logps), other than 1 only for the latter. The theorem
    is about sequences; per token it is exact for w = 1. RPG-style clip: with A' the weight over w,
    KL inside, a sample keeps its gradient iff A' >= 0 and w < 1 + clip_high, or A' < 0 and 1 -
    clip_low < w < dual_clip. The log-ratio is clamped (`kl.clamp_log_ratio`).

    Zhang et al. 2025, arXiv:2505.17508, tables 1, 2 and 4, algorithm 2 (algorithm 1 lets cut
    samples keep the gradient of A').
    """
    check_same_shape(
        policy_logps=policy_logps, behavior_logps=behavior_logps, advantages=advantages
    )
    log_w = clamp_log_ratio(policy_logps - behavior_logps.detach())
    advantages = advantages.detach()
    w = log_w.exp()

    if estimator not in ("differentiable", "reinforce"):
        raise ConfigError(
            f"rpg_loss: estimator is {estimator!r}; allowed are differentiable, reinforce"
        )
    weight = rpg_weights(policy_logps, behavior_logps, advantages, beta=beta, divergence=divergence)

    # The KL's part of the differentiable loss, over beta.
    penalty = {
        "forward_kl": -policy_logps,
        "reverse_kl": w * log_w,
        "forward_ukl": w - log_w - 1,
        "reverse_ukl": w * log_w - w,
    }[divergence]
    differentiable = -w * advantages + beta * penalty
    loss = differentiable if estimator == "differentiable" else -weight * policy_logps

    # A sample outside of the bounds keeps its value and loses its gradient.
    low, high, top = (
        bound if bound is not None else torch.inf for bound in (clip_low, clip_high, dual_clip)
    )
    keep = torch.where(weight >= 0, w < 1 + high, (w > 1 - low) & (w < top))
    return mass * torch.where(keep, loss, loss.detach())
