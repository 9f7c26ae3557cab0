"""Masked reductions and shape checks shared by every loss. Masks select by `where`, never by
multiplication: 0 * nan is nan.
"""

import torch
from torch import Tensor

from alignkit.errors import ShapeError


def check_same_shape(**tensors: Tensor) -> None:
    """Raise ShapeError unless all named tensors share one shape;
    the message names each with its shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ShapeError(f"shapes differ: {listed}; all of them must have the same shape")


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the last axis where `mask` is True. [..., T] x 2 -> [...]."""
    check_same_shape(values=values, mask=mask)
    return torch.where(mask, values, values.new_zeros(())).sum(-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last axis where `mask` is True; 0 for an empty row. [..., T] x 2 -> [...]."""
    return masked_sum(values, mask) / mask.sum(-1).clamp(min=1)


def reverse_cumsum(values: Tensor) -> Tensor:
    """Sum of this and all later entries of the last axis: [..., T] -> [..., T]."""
    return values.flip(-1).cumsum(-1).flip(-1)


def gather_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs of `labels` under `logits`, log-softmax in float32
    or wider. [..., V], [...] -> [...].
    """
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return wide.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def pair_log_ratios(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
) -> tuple[Tensor, Tensor]:
    """log policy - log reference of the chosen and of the rejected response: [B] x 4 -> [B] x 2.
    ShapeError unless all shapes are equal. No gradient goes into the reference.
    """
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
    )
    return (
        policy_chosen_logps - reference_chosen_logps.detach(),
        policy_rejected_logps - reference_rejected_logps.detach(),
    )
