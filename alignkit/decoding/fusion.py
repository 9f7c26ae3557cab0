"""Fusion of next-token laws: log q = sum of weight times log-prob, normalised."""

from collections.abc import Mapping

import torch
from torch import Tensor

from alignkit.errors import ConfigError, NumericsError
from alignkit.tensors import check_same_shape


def fuse(logprobs: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The normalised product of next-token laws: {name: [..., V]}, {name: weight} -> [..., V].

    Weights are taken as they are given, of either sign, and not divided by their sum: DeRa is
    {reference: 1 - l, aligned: l}, GenARM {base: 1, arm: 1 / beta}, proxy tuning {large: 1, tuned:
    a, untuned: -a}. A model with weight 0 is left out, its impossible tokens too. A token that is
    impossible under a model with a positive weight is impossible in the result.

    Computed in float32 or wider. ConfigError where the names differ, a weight is not finite or all
    are 0; ShapeError where shapes differ; NumericsError where no token is left, or where a token
    that the others allow is impossible under a model with a negative weight (its share would be
    infinite).

    Sources: Liu et al. 2024, arXiv:2402.02992 (DeRa); Xu et al. 2024, arXiv:2410.08193 (GenARM);
    Liu et al. 2024, arXiv:2401.08565 (proxy tuning); Liu et al. 2021, arXiv:2105.03023 (DExperts).
    """
    used = _checked_names(logprobs, weights)
    check_same_shape(**{name: logprobs[name] for name in used})

    first = next(iter(used))
    total = torch.zeros_like(_wide(logprobs[first]))
    impossible = torch.zeros_like(total, dtype=torch.bool)
    unbounded = torch.zeros_like(impossible)
    for name, weight in used.items():
        logps = _wide(logprobs[name])
        excluded = logps == -torch.inf
        if weight > 0:
            impossible = impossible | excluded
        else:
            unbounded = unbounded | excluded
        total = total + weight * logps.masked_fill(excluded, 0.0)

    if bool((unbounded & ~impossible).any()):
        raise NumericsError(
            "fusion: a token is impossible under a model with a negative weight and possible under "
            "the others, so its share would be infinite; leave that model out or mix it with another"
        )
    total = total.masked_fill(impossible, -torch.inf)
    if bool(impossible.all(-1).any()):
        raise NumericsError("fusion: the models have no token in common at some place")
    return total.log_softmax(-1)


def dynamic_weight(
    large: Tensor, tuned: Tensor, untuned: Tensor, *, most: float = 8.0
) -> tuple[Tensor, Tensor]:
    """The weight a of dynamic fusion: log-probs [..., V] x 3 -> a [...] and whether it is one [...].

    At each step q_a ~ large (tuned / untuned)^a is as far from the large model as the tuned small
    one is from the untuned one: KL(q_a || large) = KL(tuned || untuned). The left side grows with a
    from 0 on; where it stays below the right side up to a = `most` there is no such weight, and
    `most` is returned with False. Decode with `fuse` and {large: 1, tuned: a, untuned: -a}.

    Computed in float64. ShapeError where shapes differ, NumericsError for impossible tokens
    (-inf). Source: Fan et al. 2024, arXiv:2406.15480.
    """
    check_same_shape(large=large, tuned=tuned, untuned=untuned)
    logps = {"large": large, "tuned": tuned, "untuned": untuned}
    for name, law in logps.items():
        if not bool(law.isfinite().all()):
            raise NumericsError(f"dynamic fusion: {name} has a token without a finite log-prob")

    base, up, down = (law.double().log_softmax(-1) for law in logps.values())
    step = up - down
    wanted = (up.exp() * step).sum(-1)

    def distance(weight: Tensor) -> Tensor:
        fused = (base + weight[..., None] * step).log_softmax(-1)
        return (fused.exp() * (fused - base)).sum(-1)

    low = torch.zeros_like(wanted)
    high = torch.full_like(wanted, most)
    solved = distance(high) >= wanted
    for _ in range(60):
        middle = (low + high) / 2
        short = distance(middle) < wanted
        low = torch.where(short, middle, low)
        high = torch.where(short, high, middle)
    return torch.where(solved, high, torch.full_like(high, most)), solved


def selective_contrast(
    logprobs: Tensor, degraded: Tensor, *, strength: float, sure: float, plausible: float = 0.1
) -> Tensor:
    """Contrast with the law under a degraded prompt, only where the model is unsure: log-probs
    [..., V] x 2 -> [..., V], normalised.

    Where the likeliest token has at least the probability `sure` the law stays as it is. Elsewhere
    it is log q = (1 + strength) log p - strength log p_degraded over the tokens with at least
    `plausible` times the likeliest one's probability; the others are impossible.

    Wang et al. 2024, arXiv:2409.05923 (USCD), with the largest probability in place of the paper's
    measure of how sure the model is. ShapeError where shapes differ, ConfigError for a strength below
    0 or shares outside [0, 1].
    """
    check_same_shape(logprobs=logprobs, degraded=degraded)
    if strength < 0 or not 0 <= sure <= 1 or not 0 < plausible <= 1:
        raise ConfigError(
            f"selective contrast: strength {strength} (at least 0), sure {sure} (in [0, 1]), "
            f"plausible {plausible} (in (0, 1]): one of them is out of its range"
        )
    own = _wide(logprobs)
    likeliest = own.max(-1, keepdim=True).values
    outside = own < likeliest + torch.tensor(plausible).log()
    lowest = torch.finfo(own.dtype).min
    contrast = (1 + strength) * own - strength * _wide(degraded).clamp(min=lowest / 1e6)
    contrast = contrast.masked_fill(outside, -torch.inf).log_softmax(-1)
    return torch.where(likeliest.exp() >= sure, own, contrast)


def _checked_names(
    logprobs: Mapping[str, Tensor], weights: Mapping[str, float]
) -> dict[str, float]:
    """The weights that are not 0, by name."""
    if set(logprobs) != set(weights):
        raise ConfigError(
            f"fusion: log-probs are given for {_listed(logprobs)} and weights for "
            f"{_listed(weights)}; give both for the same names"
        )
    for name, weight in weights.items():
        if not abs(weight) < float("inf"):
            raise ConfigError(f"fusion: the weight of {name} is {weight}; give a finite number")
    used = {name: float(weight) for name, weight in weights.items() if weight != 0}
    if not used:
        raise ConfigError("fusion: every weight is 0; give at least one model a weight")
    return used


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(names)) or "no model"
