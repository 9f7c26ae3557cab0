"""Credit assignment: from scores to advantages. Everything here runs on the global rollout and
carries no gradient.

Everything is computed in float64: rewards may be large and differ by little. Results have the widest
dtype of the arguments. Differences that rounding explains (`ROUNDING`) count as none, so scores that
are all the same give advantages of exactly 0.

Axes: N completions, T tokens. Masks select by `where`, so what stands outside the mask (padding,
tool output) never matters.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from alignkit.errors import ConfigError, ShapeError
from alignkit.tensors import check_same_shape, reverse_cumsum

Baseline = Literal["mean", "leave_one_out", "none"]

# Scores whose spread is at most this share of the largest of them count as equal. It covers what
# float64 loses when an average or a weighted sum of rewards is taken.
ROUNDING = 64 * torch.finfo(torch.float64).eps

LARGEST_EXPONENT = 30.0  # of an entropic gain; beyond it the tangent goes on


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
    dtype = torch.promote_types(rewards.dtype, values.dtype)
    rewards = rewards.double()
    values = values.double()

    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(values.shape[:-1])
    for t in reversed(range(values.shape[-1])):
        here = mask[..., t]
        value = torch.where(here, values[..., t], next_value)
        delta = rewards[..., t] + gamma * next_value - value
        next_advantage = torch.where(here, delta + gamma * lam * next_advantage, next_advantage)
        next_value = value
        advantages[..., t] = torch.where(here, next_advantage, 0.0)

    returns = torch.where(mask, advantages + values, 0.0)
    return advantages.to(dtype), returns.to(dtype)


@torch.no_grad()
def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(values - mean) / sqrt(variance + eps) over ALL unmasked entries, population variance: [N, T]
    x 2 -> [N, T].

    Give it the global batch: statistics of a micro-batch would change with the memory setting.
    `shift_mean=False` keeps the mean (rewards). 0 outside the mask. Entries that are all equal
    become exactly 0 (or stay what they are).
    """
    check_same_shape(values=values, mask=mask)
    if not bool(mask.any()):
        return torch.zeros_like(values)

    # Counted from the lowest entry, sums do not round away small differences.
    wide = values.double()
    lowest = wide[mask].min()
    above_lowest = torch.where(mask, wide - lowest, 0.0)
    mean_above = above_lowest.sum() / mask.sum()
    mean = lowest + mean_above
    centred = torch.where(mask, above_lowest - mean_above, 0.0)

    negligible = above_lowest.max() <= ROUNDING * wide[mask].abs().max()
    centred = torch.where(negligible, 0.0, centred)
    scaled = centred * torch.rsqrt((centred**2).sum() / mask.sum() + eps)
    return (scaled if shift_mean else torch.where(mask, scaled + mean, 0.0)).to(values.dtype)


def _group_sum(values: Tensor, groups: Tensor) -> Tensor:
    """Sum of `values` over each element's group: [N, ...], [N] -> [N, ...]."""
    _, index = groups.unique(return_inverse=True)
    return torch.zeros_like(values).index_add(0, index, values)[index]


def _group_range(values: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each element's group: [N, ...], [N] -> [N, ...] x 2."""
    present, index = groups.unique(return_inverse=True)
    shape = (len(present), *values.shape[1:])
    index_of_each = index.view(-1, *[1] * (values.dim() - 1)).expand_as(values)

    lowest = values.new_full(shape, torch.inf).scatter_reduce(0, index_of_each, values, "amin")
    highest = values.new_full(shape, -torch.inf).scatter_reduce(0, index_of_each, values, "amax")
    return lowest[index], highest[index]


@torch.no_grad()
def group_baseline(scores: Tensor, groups: Tensor, *, kind: Baseline = "mean") -> Tensor:
    """Baseline of each completion from its group (same prompt): [N], [N] -> [N]; or [N, T], [N] ->
    [N, T], per position.

    "mean": the group's mean, itself included: the gradient shrinks by (K - 1) / K, nothing else.
    "leave_one_out": the mean of the others, unbiased (RLOO, Kool et al. 2019). "none": 0. A
    completion that is alone in its group is its own baseline: there is nothing to compare it with.
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

    wide = scores.double()
    size = _group_sum(torch.ones_like(wide), groups)
    total = _group_sum(wide, groups)
    others = (total - wide) / (size - 1).clamp(min=1)
    baseline = torch.where(size > 1, total / size if kind == "mean" else others, wide)
    return baseline.to(scores.dtype)


@torch.no_grad()
def alone(groups: Tensor) -> Tensor:
    """Whether a completion is the only one of its group: [N] -> [N] bool."""
    _, index, sizes = groups.unique(return_inverse=True, return_counts=True)
    return sizes[index] == 1


@torch.no_grad()
def constant_groups(scores: Tensor, groups: Tensor) -> Tensor:
    """Whether a completion's group has no difference in its scores, because they agree or because
    there is one alone: [N], [N] -> [N] bool; or per position, [N, T], [N] -> [N, T].
    """
    if not len(scores):
        return torch.zeros_like(scores, dtype=torch.bool)
    lowest, highest = _group_range(scores.double(), groups)
    return highest - lowest <= ROUNDING * torch.maximum(lowest.abs(), highest.abs())


@torch.no_grad()
def group_advantages(
    scores: Tensor,
    groups: Tensor,
    *,
    kind: Baseline = "mean",
    scale: bool = False,
    eps: float = 1e-4,
    risk: float = 0.0,
) -> Tensor:
    """Score minus group baseline: [N], [N] -> [N]; or per position, [N, T], [N] -> [N, T]. Exactly 0
    in a group whose scores are all equal, and for a completion that is alone in its group.

    `scale` divides by the group's sample standard deviation + eps (GRPO; it reweights prompts by
    difficulty and is biased). With a `risk` other than 0 (scores [N] alone) the baseline is the
    `certainty_equivalent` and the difference its `entropic_gain`: the gradient is that of the
    entropic utility, up to the error of a certainty equivalent that is estimated from the group.
    """
    if not len(scores):
        return torch.zeros_like(scores)

    # Counted from the group's lowest score, sums do not round away small differences.
    wide = scores.double()
    above_lowest = wide - _group_range(wide, groups)[0]
    advantages = wide
    if risk:
        baseline = certainty_equivalent(above_lowest, groups, risk=risk, kind=kind)
        advantages = entropic_gain(above_lowest - baseline, risk=risk)
        advantages = torch.where(constant_groups(wide, groups), 0.0, advantages)
        above_lowest = advantages
    elif kind != "none":
        advantages = above_lowest - group_baseline(above_lowest, groups, kind=kind)
        advantages = torch.where(constant_groups(wide, groups), 0.0, advantages)

    if scale:
        centred = above_lowest - group_baseline(above_lowest, groups, kind="mean")
        size = _group_sum(torch.ones_like(wide), groups)
        std = (_group_sum(centred**2, groups) / (size - 1).clamp(min=1)).sqrt()
        advantages = advantages / (torch.where(size > 1, std, 1.0) + eps)
    return advantages.to(scores.dtype)


def entropic_gain(gains: Tensor, *, risk: float) -> Tensor:
    """(1 - exp(-a x)) / a for x in `gains`, with a = `risk`: what a reward that is x above its
    certainty equivalent is worth. [...] -> [...].

    With R - CE for x, E[gain * grad log pi] is the gradient of CE = -(1 / a) log E exp(-a R), and
    the mean of the gain is 0; towards a = 0 it is x. Beyond an exponent of `LARGEST_EXPONENT` the
    exponential is continued by its tangent. ConfigError for a risk that is 0 or not finite.
    arXiv:2505.16925.
    """
    _check_risk(risk)
    exponent = -risk * gains
    inside = exponent.clamp(max=LARGEST_EXPONENT)
    beyond = (exponent - inside) * inside.exp()
    return -(torch.expm1(inside) + beyond) / risk


@torch.no_grad()
def certainty_equivalent(
    scores: Tensor, groups: Tensor, *, risk: float, kind: Baseline = "mean"
) -> Tensor:
    """-(1 / a) log of the group's mean of exp(-a score), with a = `risk`: [N], [N] -> [N].

    "mean" takes the whole group, itself included, "leave_one_out" the others: then the gradient
    that its `entropic_gain` gives has the right direction in each prompt. A completion that is
    alone in its group is its own. "none" is refused: without one there is no gain.
    """
    _check_risk(risk)
    if kind not in ("mean", "leave_one_out") or scores.dim() != 1:
        raise ConfigError(
            f"certainty_equivalent: kind is {kind!r} and scores {list(scores.shape)}; a risk needs "
            "kind 'mean' or 'leave_one_out' and one score per completion"
        )

    # One row per completion, with the exponents of those that it is compared with.
    same = groups.unsqueeze(0) == groups.unsqueeze(1)
    if kind == "leave_one_out":
        itself = torch.eye(len(groups), dtype=torch.bool, device=groups.device)
        same = same & (~itself | alone(groups))
    exponents = (-risk * scores.double()).expand_as(same)
    count = same.sum(-1)
    log_mean = exponents.masked_fill(~same, -torch.inf).logsumexp(-1) - count.double().log()

    # Near 0 a logarithm of nearly 1 would lose the digits.
    from_one = torch.where(same, torch.expm1(exponents), 0.0).sum(-1) / count
    small = torch.where(same, exponents.abs(), 0.0).amax(-1) < 0.5
    log_mean = torch.where(small, torch.log1p(torch.where(small, from_one, 0.0)), log_mean)
    return -log_mean / risk


@torch.no_grad()
def entropic_advantages(
    rewards: Tensor, values: Tensor, returns: Tensor, mask: Tensor, *, risk: float
) -> Tensor:
    """Advantages of an entropic utility from values that are certainty equivalents of the reward
    still to come: [N, T] x 4 -> [N, T], 0 outside the mask.

    The weight of a completion in the gradient of the utility is `entropic_gain` of its whole reward
    minus the value before its first token. What the same gain is at the value of the prefix is
    subtracted from it, which changes no mean. Towards risk 0 it is `returns` - `values`.
    """
    check_same_shape(rewards=rewards, values=values, returns=returns, mask=mask)
    own = torch.where(mask, rewards.double(), 0.0)
    past = own.cumsum(-1) - own
    first = mask & (mask.cumsum(-1) == 1)
    start = torch.where(first, values.double(), 0.0).sum(-1, keepdim=True)

    after = entropic_gain(past + returns.double() - start, risk=risk)
    before = entropic_gain(past + values.double() - start, risk=risk)
    return torch.where(mask, after - before, 0.0).to(values.dtype)


def _check_risk(risk: float) -> None:
    if risk == 0 or not math.isfinite(risk):
        raise ConfigError(
            f"risk is {risk}; give a finite number other than 0 (the limit is a mean)"
        )


@torch.no_grad()
def shaped_rewards(
    scores: Tensor,
    kl: Tensor,
    mask: Tensor,
    *,
    beta: float | Tensor,
    rewards: Tensor | None = None,
) -> Tensor:
    """-beta * kl_t on every unmasked token plus the score on the last one: [N], [N, T], [N, T] ->
    [N, T]; or, where there are `rewards` per token [N, T], plus those in place of the score.

    With kl_t = k1 on the rollout policy this is the reward whose policy gradient is that of
    E[score] - beta * KL(policy || reference) (Ziegler et al. 2019, arXiv:1909.08593, eq. 2). Single
    kl_t may be negative; they are not clipped.
    """
    check_same_shape(kl=kl, mask=mask)
    if scores.shape != kl.shape[:-1]:
        raise ShapeError(
            f"shaped_rewards: scores {list(scores.shape)} must have one entry per row of kl {list(kl.shape)}"
        )
    dtype = torch.promote_types(scores.dtype, kl.dtype)
    penalties = torch.where(mask, -beta * kl.double(), 0.0)
    if rewards is None:
        rewards = at_the_end(scores, mask)
    check_same_shape(rewards=rewards, mask=mask)
    return (penalties + torch.where(mask, rewards.double(), 0.0)).to(dtype)


@torch.no_grad()
def at_the_end(scores: Tensor, mask: Tensor) -> Tensor:
    """Each row's score on its last unmasked token, 0 elsewhere: [N], [N, T] -> [N, T] float64."""
    last = mask & (reverse_cumsum(mask.long()) == 1)
    return torch.where(last, scores.double().unsqueeze(-1), 0.0)


@torch.no_grad()
def reward_to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    """Sum of this and all later rewards, 0 outside the mask: [N, T] x 2 -> [N, T]."""
    check_same_shape(rewards=rewards, mask=mask)
    later = reverse_cumsum(torch.where(mask, rewards.double(), 0.0))
    return torch.where(mask, later, 0.0).to(rewards.dtype)


@torch.no_grad()
def adapt_beta(beta: Tensor, kl: Tensor, *, target: float, horizon: float, samples: int) -> Tensor:
    """The adaptive KL coefficient's next value, from the mean sequence
    KL (nats per completion) of `samples` completions.

    beta * (1 + clip(kl / target - 1, -0.2, 0.2) * samples / horizon), never below 0. Ziegler et al.
    2019, section 2.2.
    """
    return (beta * (1 + (kl / target - 1).clamp(-0.2, 0.2) * samples / horizon)).clamp(min=0.0)
