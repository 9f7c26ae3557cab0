"""Losses and credit from a teacher's log-probs of sampled tokens, and from its whole law (PLD).

Axes: B rows, T tokens, V vocabulary. Log-probs of the teacher, the behaviour policy and the
reference never have a gradient. Losses come back per token, not masked and not averaged.
"""

from typing import Literal

import torch
from torch import Tensor

from alignkit import divergences
from alignkit.errors import ConfigError, ShapeError
from alignkit.kl import importance, k2
from alignkit.objectives.surrogates import ppo_loss
from alignkit.objectives.vocabulary_divergences import normalised
from alignkit.tensors import check_same_shape


def pld_loss(policy_logprobs: Tensor, teacher_logprobs: Tensor, labels: Tensor) -> Tensor:
    """Plackett-Luce distillation per token: [..., V] x 2, labels [...] int64 -> [...].

    The tokens are ranked: the label first, the others by the teacher's log-probs. The loss is the
    sum over the ranking of q_k (logsumexp over j >= k of the policy's log-probs - the k-th one),
    with q the teacher's law in that order. A teacher that is sure of the label gives the
    cross-entropy. Source: PLD, arXiv:2506.12542.
    """
    check_same_shape(policy_logprobs=policy_logprobs, teacher_logprobs=teacher_logprobs)
    if labels.shape != policy_logprobs.shape[:-1]:
        raise ShapeError(
            f"labels has the shape {list(labels.shape)}; it should be "
            f"{list(policy_logprobs.shape[:-1])}, one per law"
        )
    policy = normalised(policy_logprobs)
    teacher = normalised(teacher_logprobs.detach()).to(policy.dtype)

    first = teacher.scatter(-1, labels.unsqueeze(-1), torch.inf)
    order = first.argsort(dim=-1, descending=True)
    weights = teacher.exp().gather(-1, order)
    ranked = policy.gather(-1, order)

    # A token that is impossible under the policy and has no weight would be -inf minus -inf.
    ignored = (ranked == -torch.inf) & (weights == 0)
    finite = ranked.masked_fill(ignored, torch.finfo(ranked.dtype).min)
    rest = finite.flip(-1).logcumsumexp(-1).flip(-1)
    return (weights * (rest - finite).masked_fill(ignored, 0.0)).sum(-1)


def opd_loss(
    policy_logps: Tensor,
    behavior_logps: Tensor,
    teacher_logps: Tensor,
    *,
    clip_low: float | None = None,
    clip_high: float | None = None,
) -> Tensor:
    """On-policy distillation by sampled tokens: [B, T] x 3 -> [B, T].

    PPO's surrogate with the advantage teacher - behavior, detached. On the policy's own samples its
    expected gradient is that of the reverse KL at the sampled prefixes, without credit for
    divergence caused later. Source: Lu et al. 2025, "On-policy distillation", Thinking Machines.
    """
    check_same_shape(
        policy_logps=policy_logps, behavior_logps=behavior_logps, teacher_logps=teacher_logps
    )
    advantages = (teacher_logps - behavior_logps).detach()
    return ppo_loss(
        policy_logps, behavior_logps, advantages, clip_low=clip_low, clip_high=clip_high
    )


def kdrl_loss(
    policy_logps: Tensor,
    behavior_logps: Tensor,
    teacher_logps: Tensor,
    advantages: Tensor,
    *,
    kd_weight: float,
    scores: Tensor | None = None,
    masking: Literal["none", "response"] = "none",
) -> Tensor:
    """Policy gradient plus `kd_weight` times k2 of policy - teacher: [B, T] x 4 -> [B, T].

    The gradient of k2 on own samples is that of the reverse KL to the teacher. With
    masking="response", rows whose score [B] is positive lose the teacher's term. ConfigError for a
    negative weight or masking without scores. Source: Xu et al. 2025, arXiv:2506.02208, eqs. 8, 9.
    """
    check_same_shape(
        policy_logps=policy_logps,
        behavior_logps=behavior_logps,
        teacher_logps=teacher_logps,
        advantages=advantages,
    )
    if not 0 <= kd_weight < float("inf"):
        raise ConfigError(f"kd_weight is {kd_weight}; it should be at least 0 and finite")
    if masking not in ("none", "response"):
        raise ConfigError(f"masking is {masking!r}; allowed: none, response")

    distilled = kd_weight * k2(policy_logps - teacher_logps.detach())
    if masking == "response":
        if scores is None:
            raise ConfigError("masking by response needs the scores of the rows; give scores [B]")
        if scores.shape != policy_logps.shape[:1]:
            raise ShapeError(f"scores has the shape {list(scores.shape)}; it should be [B]")
        distilled = torch.where((scores > 0).unsqueeze(-1), 0.0, distilled)
    return ppo_loss(policy_logps, behavior_logps, advantages) + distilled


@torch.no_grad()
def minillm_advantages(
    policy_logps: Tensor,
    teacher_logps: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    length_normalised: bool = False,
) -> Tensor:
    """Reward-to-go of teacher - policy, the token itself included: [B, T] x 3 -> [B, T].

    At own token t it is the sum over own tokens s >= t of gamma ** (number of own tokens from t to
    s) times (teacher - policy); `length_normalised` divides by the sum of the same powers, which is
    no longer the gradient of a KL. Tokens outside the mask are stepped over and come back as 0. An
    objective that adds the exact KL of step t subtracts the term at t itself. Computed in float64.
    ConfigError for gamma outside [0, 1]. Source: Gu et al. 2024, arXiv:2306.08543, eq. 6.
    """
    check_same_shape(policy_logps=policy_logps, teacher_logps=teacher_logps, mask=mask)
    if not 0 <= gamma <= 1:
        raise ConfigError(f"gamma is {gamma}; it should be between 0 and 1")
    rewards = torch.where(mask, teacher_logps.double() - policy_logps.double(), 0.0)
    result = torch.zeros_like(rewards)
    total = rewards.new_zeros(rewards.shape[:-1])
    powers = torch.zeros_like(total)
    for t in reversed(range(rewards.shape[-1])):
        here = mask[..., t]
        total = torch.where(here, rewards[..., t] + gamma * total, total)
        powers = torch.where(here, 1 + gamma * powers, powers)
        value = total / powers.clamp(min=1) if length_normalised else total
        result[..., t] = torch.where(here, value, 0.0)
    return result.to(policy_logps.dtype)


def dph_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    *,
    divergence: str | divergences.Divergence = "forward_kl",
) -> Tensor:
    """f of the ratio policy / reference at tokens that the reference sampled: [B, T] x 2 -> [B, T].

    Rehearsal of answers that the initial policy got right: with `forward_ukl` its sum over tokens
    has the gradient of the sequence's forward KL. Source: DPH-RL, arXiv:2509.07430, eqs. 5, 6.
    """
    check_same_shape(policy_logps=policy_logps, reference_logps=reference_logps)
    chosen = divergences.get(divergence) if isinstance(divergence, str) else divergence
    return chosen.f(policy_logps - reference_logps.detach())


def fdpg_loss(
    policy_logps: Tensor,
    behavior_logps: Tensor,
    reference_logps: Tensor,
    scores: Tensor,
    log_z: Tensor,
    *,
    beta: float,
    divergence: str | divergences.Divergence = "forward_kl",
) -> Tensor:
    """f-divergence policy gradient towards reference * exp(score / beta) / Z: [B] x 5 -> [B].

    Log-probs are sums over whole responses; `log_z` is that of the row's prompt. The mean over the
    behaviour policy's samples has the gradient of D_f(policy || target): w f'(t) log policy with
    the importance w = policy / behavior and t = policy / target, both detached. Source: Go et al.
    2023, arXiv:2302.08215, theorem 1.
    """
    check_same_shape(
        policy_logps=policy_logps,
        behavior_logps=behavior_logps,
        reference_logps=reference_logps,
        scores=scores,
        log_z=log_z,
    )
    _check_beta(beta)
    chosen = divergences.get(divergence) if isinstance(divergence, str) else divergence
    with torch.no_grad():
        target = reference_logps + scores / beta - log_z
        pull = chosen.f_prime(policy_logps - target)
        weight = importance(policy_logps, behavior_logps)
    return weight * pull * policy_logps


def trajectory_balance_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    scores: Tensor,
    log_z: Tensor,
    *,
    beta: float,
) -> Tensor:
    """(log Z + log policy - log reference - score / beta)^2: [B] x 4 -> [B].

    Log-probs are sums over whole responses. It is 0 for all responses exactly at the tilted optimum
    reference * exp(score / beta) / Z, whoever sampled them. `log_z` may be learned (it keeps its
    gradient) or a detached mean over the group. Source: Malkin et al. 2022, arXiv:2201.13259; Hu et
    al. 2024, arXiv:2310.04363.
    """
    check_same_shape(
        policy_logps=policy_logps, reference_logps=reference_logps, scores=scores, log_z=log_z
    )
    _check_beta(beta)
    return (log_z + policy_logps - reference_logps.detach() - scores.detach() / beta) ** 2


def _check_beta(beta: float) -> None:
    if not 0 < beta < float("inf"):
        raise ConfigError(f"beta is {beta}; give a positive, finite number")
