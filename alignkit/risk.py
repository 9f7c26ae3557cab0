"""Risk measures of the log-ratio X = log(reference / policy)
when tokens are drawn from the reference.

The mean of X is the forward KL. CVaR and the entropic risk weigh its upper tail more: tokens that
the policy has made less likely. Chen et al. 2025, arXiv:2505.20359; the upper tail is what the
paper's value recursion (eq. 6) needs.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.tensors import check_same_shape

Risk = Literal["kl", "cvar", "erm"]
SORTED = 4096  # up to here a sort is as fast as a search
BINS = 4096


def risk_ratio(
    policy_logprobs: Tensor,
    reference_logprobs: Tensor,
    risk: Risk = "kl",
    level: float = 1.0,
    compat: Literal["repo"] | None = None,
) -> Tensor:
    """Risk under the reference of X = log reference - log policy
    over the last axis: [..., V] x 2 -> [...].

    `kl`: the mean. `cvar`: the mean of the largest X that carry the reference mass `level` (0 <
    level <= 1; the boundary token counts with the fraction that fits; 1 is the KL). `erm`: log E
    exp(level X) / level (level > 0; towards 0 it is the KL). `compat="repo"` (cvar only) is what
    the paper's released code computes instead, see `_repo_quantile`. The gradient with respect to
    log policy is minus a distribution over tokens (the reference reweighted). Tokens without
    reference mass count nothing, also where both log-probs are -inf. Half-precision input gives a
    float32 result.
    """
    check_same_shape(policy_logprobs=policy_logprobs, reference_logprobs=reference_logprobs)
    policy = _normalised(policy_logprobs)
    reference = _normalised(reference_logprobs)

    # Tokens without reference mass count nothing; where both are -inf their difference is nan.
    support = reference > -math.inf
    zero = reference.new_zeros(())
    x = torch.where(support, reference, zero) - torch.where(support, policy, zero)

    if compat is not None:
        if compat != "repo" or risk != "cvar":
            raise ConfigError(
                f"risk_ratio: compat={compat!r} with risk={risk!r}; "
                "the only other behaviour is 'repo' with 'cvar'"
            )
        _check_level(risk, level)
        return _repo_quantile(x, reference, level)
    return measure(x, reference, risk, level)


def measure(
    values: Tensor, reference_logprobs: Tensor, risk: Risk = "kl", level: float = 1.0
) -> Tensor:
    """Upper-tail risk of finite `values` under the reference, over the last axis: [..., V] x 2 ->
    [...]. See `risk_ratio`.
    """
    _check_level(risk, level)
    if risk == "cvar" and level < 1:
        return _cvar(values, reference_logprobs, level)
    if risk == "erm":
        return _entropic(values, reference_logprobs, level)
    return _mean(values, reference_logprobs)


def _normalised(logprobs: Tensor) -> Tensor:
    """In float32 or wider, without log_softmax's rounding of the total mass (5e-6 in float32 at
    128k tokens; a constant).
    """
    wide = logprobs.float() if logprobs.dtype in (torch.bfloat16, torch.float16) else logprobs
    return wide - wide.detach().exp().sum(-1, keepdim=True).log()


def _check_level(risk: str, level: float) -> None:
    if risk not in ("kl", "cvar", "erm"):
        raise ConfigError(f"risk is {risk!r}; allowed: kl, cvar, erm")
    if risk == "cvar" and not 0 < level <= 1:
        raise ConfigError(
            f"risk 'cvar': level is {level}, a probability mass; it must be above 0 and at most 1 (1 is the KL)"
        )
    if risk == "erm" and not 0 < level < math.inf:
        raise ConfigError(
            f"risk 'erm': level is {level}; it must be positive and finite (towards 0 it is the KL)"
        )


def _mean(values: Tensor, log_weights: Tensor) -> Tensor:
    weights = log_weights.exp()
    return torch.where(weights > 0, weights * values, values.new_zeros(())).sum(-1)


def _cvar(values: Tensor, log_weights: Tensor, level: float) -> Tensor:
    """t + E max(X - t, 0) / level (Rockafellar and Uryasev 2000)
    with t the value of the boundary atoms.

    Because t carries their gradient, those atoms receive exactly the fraction of their mass that
    fits; ties share it by their mass. The formula is flat at its minimum: where rounding of the
    masses picks a neighbouring atom the value does not move.
    """
    find = _searched if values.shape[-1] > SORTED and values.device.type == "cpu" else _sorted
    at_boundary = find(values.detach(), log_weights, level)
    atoms = torch.where(at_boundary, log_weights.detach(), -math.inf).softmax(-1)
    threshold = torch.where(atoms > 0, atoms * values, values.new_zeros(())).sum(-1, keepdim=True)
    return threshold.squeeze(-1) + _mean((values - threshold).relu(), log_weights) / level


def _sorted(values: Tensor, log_weights: Tensor, level: float) -> Tensor:
    """Which atoms [..., V] have the value with which the largest
    values first carry the mass `level`.
    """
    support = log_weights > -math.inf
    index = torch.where(support, values, -math.inf).argsort(-1, descending=True)
    mass = log_weights.exp().gather(-1, index).cumsum(-1, dtype=torch.float64)
    last = support.sum(-1, keepdim=True) - 1  # rounding may leave the whole mass short of the level
    boundary = index.gather(-1, (mass < level).sum(-1, keepdim=True).minimum(last))
    return support & (values == values.gather(-1, boundary))


def _searched(values: Tensor, log_weights: Tensor, level: float) -> Tensor:
    """As `_sorted`, with what lies within 1e-7 of the range's width together; several times as fast
    on a CPU.

    Masses are summed over bins of equal width, then over bins of the bin that holds the boundary.
    """
    weights = log_weights.exp()
    low = torch.where(weights > 0, values, math.inf).amin(-1, keepdim=True)
    high = values.amax(-1, keepdim=True)
    if not bool(torch.isfinite(high - low).all()):  # a token that the policy rules out
        return _sorted(values, log_weights, level)
    missing = torch.full_like(low, level, dtype=torch.float64)
    inside = weights > 0
    for _ in range(2):
        width = (high - low) / BINS
        place = (values - low) / width.clamp(min=torch.finfo(values.dtype).tiny)
        bins = place.clamp_(0, BINS - 1).long()
        sums = torch.zeros(*values.shape[:-1], BINS, dtype=torch.float64, device=values.device)
        sums.scatter_add_(-1, bins, (weights * inside).double())
        above = sums.flip(-1).cumsum(-1).flip(-1)  # of each bin and those over it
        boundary = ((above >= missing).sum(-1, keepdim=True) - 1).clamp(min=0)
        missing = missing - (above - sums).gather(-1, boundary)

        # The next round divides the bin that holds the boundary.
        inside &= bins == boundary
        low = low + boundary * width
        high = low + width
    return inside


def _entropic(values: Tensor, log_weights: Tensor, level: float) -> Tensor:
    """log E exp(level X) / level; by log1p and expm1 where level
    |X| < 1, so that small levels do not cancel.
    """
    scaled = level * values
    small = torch.where(log_weights > -math.inf, scaled, scaled.new_zeros(())).abs().amax(-1) < 1
    near = torch.where(small.unsqueeze(-1), scaled, scaled.new_zeros(()))
    precise = torch.log1p(_mean(torch.expm1(near), log_weights))
    general = (log_weights + scaled).logsumexp(-1)
    return torch.where(small, precise, general) / level


def _repo_quantile(x: Tensor, log_weights: Tensor, level: float) -> Tensor:
    """The released code: per half of the vocabulary the sum of p_ref * X over X above its (1 -
    level) quantile, where each token counts once in the quantile whatever its probability; not
    divided by the level, no gradient through the quantile. It is no CVaR: at level 1 it still drops
    the smallest X.
    """
    half = x.shape[-1] // 2
    total = x.new_zeros(x.shape[:-1])
    for part, weights in (
        (x[..., :half], log_weights[..., :half]),
        (x[..., half:], log_weights[..., half:]),
    ):
        position = (1 - level) * (part.shape[-1] - 1)
        low = part.detach().kthvalue(int(position) + 1, -1, keepdim=True).values
        high = part.detach().kthvalue(math.ceil(position) + 1, -1, keepdim=True).values
        quantile = low + (high - low) * (position - int(position))
        tail = torch.where(part > quantile, part, part.new_zeros(()))
        total = total + _mean(tail, weights)
    return total
