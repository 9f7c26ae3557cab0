"""Credit assignment: from scores to advantages. Everything here runs on the global rollout and
carries no gradient.

Axes: N completions, T tokens. Masks select by `where`, so what stands outside the mask (padding,
tool output) never matters.
"""

from typing import Literal

import torch
from torch import Tensor

from alignkit.errors import ConfigError, ShapeError
from alignkit.tensors import check_same_shape, reverse_cumsum

Baseline = Literal["mean", "leave_one_out", "none"]


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: [N, T] x 3 -> advantages [N, T], returns [N, T]; both 0
    where `mask` is False.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1}, return = A_t + V_t. The
    value after the last unmasked token is 0. Masked positions are stepped over: the result is that
    of the sequence without them.

    Schulman et al. 2016, arXiv:1506.02438, eq. 16.

    >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), torch.tensor([[True, True]]), gamma=1.0, lam=1.0)[0]
    tensor([[0.5000, 0.5000]])
    """
    check_same_shape(rewards=rewards, values=values, mask=mask)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(values.shape[:-1])
    for t in reversed(range(values.shape[-1])):
        here = mask[..., t]
        value = torch.where(here, values[..., t], next_value)
        delta = rewards[..., t] + gamma * next_value - value
        next_advantage = torch.where(here, delta + gamma * lam * next_advantage, next_advantage)
        next_value = value
        advantages[..., t] = torch.where(here, next_advantage, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


@torch.no_grad()
def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(values - mean) / sqrt(variance + eps) over ALL unmasked entries, population variance: [N, T]
    x 2 -> [N, T].

    Give it the global batch: statistics of a micro-batch would change with the memory setting.
    `shift_mean=False` keeps the mean (rewards). 0 outside the mask.
    """
    check_same_shape(values=values, mask=mask)
    count = mask.sum().clamp(min=1)
    mean = torch.where(mask, values, 0.0).sum() / count
    centred = torch.where(mask, values - mean, 0.0)
    scaled = centred * torch.rsqrt((centred**2).sum() / count + eps)
    return scaled if shift_mean else torch.where(mask, scaled + mean, 0.0)


def _group_sum(values: Tensor, groups: Tensor) -> Tensor:
    """Sum of `values` over each element's group: [N, ...], [N] -> [N, ...]."""
    _, index = groups.unique(return_inverse=True)
    return torch.zeros_like(values).index_add(0, index, values)[index]


@torch.no_grad()
def group_baseline(scores: Tensor, groups: Tensor, *, kind: Baseline = "mean") -> Tensor:
    """Baseline of each completion from its group (same prompt): [N], [N] -> [N]; or [N, T], [N] ->
    [N, T], per position.

    "mean": the group's mean, itself included: the gradient shrinks by (K - 1) / K, nothing else.
    "leave_one_out": the mean of the others, unbiased (RLOO, Kool et al. 2019). "none": 0. A group
    of one has baseline 0.
    """
    if scores.shape[:1] != groups.shape:
        raise ShapeError(
            f"group_baseline: groups {list(groups.shape)} need one entry per row of scores {list(scores.shape)}"
        )
    if kind not in ("mean", "leave_one_out", "none"):
        raise ConfigError(
            f"group_baseline: kind is {kind!r}; it must be 'mean', 'leave_one_out' or 'none'"
        )
    if kind == "none" or not len(scores):
        return torch.zeros_like(scores)
    size = _group_sum(torch.ones_like(scores), groups)
    total = _group_sum(scores, groups)
    others = (total - scores) / (size - 1).clamp(min=1)
    return torch.where(size > 1, total / size if kind == "mean" else others, 0.0)


@torch.no_grad()
def constant_groups(scores: Tensor, groups: Tensor) -> Tensor:
    """Whether a completion's group has two or more members, all with one score: [N], [N] -> [N]
    bool.
    """
    check_same_shape(scores=scores, groups=groups)
    if not len(scores):
        return torch.zeros_like(groups, dtype=torch.bool)
    _, index, size = groups.unique(return_inverse=True, return_counts=True)
    n = len(size)
    low = scores.new_full((n,), torch.inf).scatter_reduce(0, index, scores, "amin")
    high = scores.new_full((n,), -torch.inf).scatter_reduce(0, index, scores, "amax")
    return ((low == high) & (size > 1))[index]


@torch.no_grad()
def group_advantages(
    scores: Tensor,
    groups: Tensor,
    *,
    kind: Baseline = "mean",
    scale: bool = False,
    eps: float = 1e-4,
) -> Tensor:
    """Score minus group baseline, exactly 0 in a group whose scores are all equal: [N], [N] -> [N].

    `scale` divides by the group's sample standard deviation + eps (GRPO; it reweights prompts by
    difficulty and is biased).
    """
    advantages = scores - group_baseline(scores, groups, kind=kind)
    if kind != "none":
        advantages = torch.where(constant_groups(scores, groups), 0.0, advantages)
    if scale:
        centred = scores - group_baseline(scores, groups, kind="mean")
        size = _group_sum(torch.ones_like(scores), groups)
        std = (_group_sum(centred**2, groups) / (size - 1).clamp(min=1)).sqrt()
        advantages = advantages / (torch.where(size > 1, std, 1.0) + eps)
    return advantages


@torch.no_grad()
def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, beta: float | Tensor) -> Tensor:
    """-beta * kl_t on every unmasked token plus the score on the last one: [N], [N, T], [N, T] ->
    [N, T].

    With kl_t = k1 on the rollout policy this is the reward whose policy gradient is that of
    E[score] - beta * KL(policy || reference) (Ziegler et al. 2019, arXiv:1909.08593, eq. 2). Single
    kl_t may be negative; they are not clipped.
    """
    check_same_shape(kl=kl, mask=mask)
    if scores.shape != kl.shape[:-1]:
        raise ShapeError(
            f"shaped_rewards: scores {list(scores.shape)} must have one entry per row of kl {list(kl.shape)}"
        )
    last = mask & (reverse_cumsum(mask.long()) == 1)
    return torch.where(mask, -beta * kl, 0.0) + torch.where(last, scores.unsqueeze(-1), 0.0)


@torch.no_grad()
def reward_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    """Sum of this and all later rewards, 0 outside the mask: [N, T] x 2 -> [N, T]."""
    check_same_shape(rewards=rewards, mask=mask)
    return torch.where(mask, reverse_cumsum(torch.where(mask, rewards, 0.0)), 0.0)


@torch.no_grad()
def adapt_beta(beta: Tensor, kl: Tensor, *, target: float, horizon: float, samples: int) -> Tensor:
    """The adaptive KL coefficient's next value, from the mean sequence KL (nats per completion) of
    `samples` completions.

    beta * (1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon), never below 0. Ziegler et al.
    2019, section 2.2.
    """
    return (beta * (1 + (kl / target - 1).clamp(-0.2, 0.2) * samples / horizon)).clamp(min=0.0)
