"""Divergences between two next-token laws, one value per prefix: what distillation is made of.

All functions work on whole laws [..., V]. A token that is impossible under both models adds nothing
and has gradient 0.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.tensors import check_same_shape

VocabularyDivergence = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "akl", "total_variation"
]
NAMES = VocabularyDivergence.__args__  # type: ignore[attr-defined]


def distillation_loss(
    policy_logprobs: Tensor,
    teacher_logprobs: Tensor,
    *,
    divergence: VocabularyDivergence = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    mu: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """Divergence between the policy's and the teacher's next-token law: [..., V] x 2 -> [...], nats.

    With S the policy, T the teacher and KL(P || Q) = sum P (log P - log Q):

    - `forward_kl` KL(T || S), covers the teacher's mass; `reverse_kl` KL(S || T), seeks its modes
    - `jsd` beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S
    - `skew_kl` KL(T || alpha T + (1 - alpha) S); `skew_reverse_kl` KL(S || (1 - alpha) T + alpha S)
    - `akl` forward and reverse KL, weighted by their gaps on the head (the fewest top tokens of the
      teacher with mass at least `mu`) and the tail
    - `total_variation` half the sum of |T - S|

    Both laws are normalised again after the cast to float32 (or wider) and the division by the
    temperature; there is no hidden factor temperature ** 2. The gradient goes into the policy
    alone, and the value is never negative. Where a token is impossible under the teacher alone the
    reverse KL is infinite.

    ConfigError for an unknown divergence, beta outside (0, 1) with `jsd` (ask for `forward_kl` or
    `reverse_kl` by name), alpha outside [0, 1), mu outside (0, 1] or a temperature that is not
    positive; ShapeError for different shapes. Sources: Agarwal et al. 2024, arXiv:2306.13649 (jsd);
    Ko et al. 2024, arXiv:2402.03898 (skew); Wu et al. 2024, arXiv:2404.02657 (akl).
    """
    check_same_shape(policy_logprobs=policy_logprobs, teacher_logprobs=teacher_logprobs)
    check_settings(divergence, beta, alpha, mu, temperature)
    policy = normalised(policy_logprobs, temperature)
    teacher = normalised(teacher_logprobs.detach(), temperature).to(policy.dtype)
    return divergence_of_laws(policy, teacher, divergence, beta=beta, alpha=alpha, mu=mu)


def divergence_of_laws(
    policy: Tensor,
    teacher: Tensor,
    divergence: VocabularyDivergence,
    *,
    beta: float = 0.5,
    alpha: float = 0.1,
    mu: float = 0.5,
) -> Tensor:
    """`distillation_loss` of log-probs that are normalised already, in float32 or wider, and whose
    settings are checked: it saves two passes over [..., V].
    """
    if divergence == "total_variation":
        return 0.5 * (teacher.exp() - policy.exp()).abs().sum(-1)
    if divergence == "akl":
        return _nonnegative(_adaptive(policy, teacher, mu))
    if divergence == "jsd":
        mixture = _mixture(teacher, policy, beta)
        parts = beta * _kl(teacher, mixture) + (1 - beta) * _kl(policy, mixture)
        return _nonnegative(parts)
    if divergence in ("skew_kl", "skew_reverse_kl"):
        policy_share = 1 - alpha if divergence == "skew_kl" else alpha
        mixture = _mixture(teacher, policy, 1 - policy_share)
        return _nonnegative(_kl(teacher if divergence == "skew_kl" else policy, mixture))
    first, second = (teacher, policy) if divergence == "forward_kl" else (policy, teacher)
    return _nonnegative(_kl(first, second))


def constrained_kl(policy_logprobs: Tensor, chances: Tensor) -> Tensor:
    """KL(q || policy) with q the policy's own next-token law given that a constraint will hold:
    [..., V] x 2 -> [...], nats.

    `chances` are the probabilities, from 0 to 1, that the whole text meets the constraint after each
    token, by a model of it: q is policy * chances, normalised and detached. With exact chances the
    sum along texts of the posterior is -log P(constraint). 0 at a prefix after which it cannot hold.

    ShapeError for different shapes, ConfigError for chances outside [0, 1]. Source: attribute
    control by an auxiliary model, arXiv:2410.05559.
    """
    check_same_shape(policy_logprobs=policy_logprobs, chances=chances)
    # sums of probabilities are rounded, so that a certain one may be a little above 1
    if bool(((chances < 0) | (chances > 1 + 1e-5) | chances.isnan()).any()):
        raise ConfigError("constrained_kl: a chance is not between 0 and 1; give probabilities")
    policy = normalised(policy_logprobs)
    joint = policy.detach() + chances.detach().to(policy.dtype).log()
    possible = (joint > -torch.inf).any(-1, keepdim=True)
    posterior = torch.where(possible, joint, policy.detach()).log_softmax(-1)
    return torch.where(possible.squeeze(-1), _nonnegative(_kl(posterior, policy)), 0.0)


def normalised(logprobs: Tensor, temperature: float = 1.0) -> Tensor:
    """log_softmax(logprobs / temperature) in float32 or wider: [..., V] -> [..., V].

    Rounded log-probs do not sum to 1, which would make a divergence negative.
    """
    wide = logprobs.to(torch.promote_types(logprobs.dtype, torch.float32))
    return (wide / temperature).log_softmax(-1)


def _kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of log-probs: [..., V] x 2 -> [...]."""
    difference = (first - second).masked_fill(first == -torch.inf, 0.0)
    return (first.exp() * difference).sum(-1)


def _mixture(teacher: Tensor, policy: Tensor, teacher_share: float) -> Tensor:
    """log of share T + (1 - share) S: [..., V] x 2 -> [..., V]. Impossible under both: -inf."""
    if teacher_share == 0:
        return policy
    if teacher_share == 1:
        return teacher

    # logaddexp of -inf and -inf has no gradient, so those tokens are taken out of its way.
    impossible = (teacher == -torch.inf) & (policy == -torch.inf)
    mixed = torch.logaddexp(
        teacher.masked_fill(impossible, 0.0) + math.log(teacher_share),
        policy.masked_fill(impossible, 0.0) + math.log1p(-teacher_share),
    )
    return mixed.masked_fill(impossible, -torch.inf)


def _adaptive(policy: Tensor, teacher: Tensor, mu: float) -> Tensor:
    """The forward KL weighted by the gap on the teacher's head, the reverse KL by the tail's."""
    gap = (teacher.exp() - policy.detach().exp()).abs()
    order = teacher.argsort(dim=-1, descending=True)
    mass = teacher.exp().gather(-1, order)
    before = mass.cumsum(-1) - mass
    head = torch.zeros_like(gap, dtype=torch.bool).scatter(-1, order, before < mu) | (mu == 1)

    head_gap = torch.where(head, gap, 0.0).sum(-1)
    tail_gap = torch.where(head, 0.0, gap).sum(-1)
    total = head_gap + tail_gap
    share = torch.where(total > 0, head_gap / total.clamp(min=torch.finfo(gap.dtype).tiny), 0.5)
    reverse = torch.where(share == 1, 0.0, _kl(policy, teacher))  # 0 times infinity is no number
    return share * _kl(teacher, policy) + (1 - share) * reverse


def _nonnegative(values: Tensor) -> Tensor:
    """Rounding below 0 is cut off; the gradient is kept."""
    return values + (values.clamp(min=0) - values).nan_to_num(0.0).detach()


def check_settings(
    divergence: str, beta: float, alpha: float, mu: float, temperature: float
) -> None:
    """ConfigError for settings that `distillation_loss` cannot have."""
    if divergence not in NAMES:
        raise ConfigError(f"unknown divergence {divergence!r}; allowed: {', '.join(NAMES)}")
    if divergence == "jsd" and not 0 < beta < 1:
        raise ConfigError(
            f"beta is {beta}; jsd needs a value between 0 and 1 (it vanishes at both ends: ask for "
            "forward_kl or reverse_kl by name)"
        )
    if not 0 <= alpha < 1:
        raise ConfigError(f"alpha is {alpha}; it should be at least 0 and below 1")
    if not 0 < mu <= 1:
        raise ConfigError(f"mu is {mu}; it should be above 0 and at most 1")
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature is {temperature}; give a positive, finite number")
