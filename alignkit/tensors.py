"""Tensors of log-probs: the containers that the models fill, and the masked reductions and shape
checks that every loss shares. Masks select by `where`, never by multiplication: 0 * nan is nan.

Axes: N completions of a whole batch, T tokens. Log-probs are natural logarithms, in nats.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from alignkit.errors import ShapeError


def check_same_shape(**tensors: Tensor) -> None:
    """Raise ShapeError unless all named tensors share one shape;
    the message names each with its shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ShapeError(f"shapes differ: {listed}; all of them must have the same shape")


def stacked(rows: Sequence[Tensor], length: int, filling: float = 0) -> Tensor:
    """N rows [T_n, ...] of at most `length` entries under one another, [N, length, ...], with
    `filling` behind the end of each. At least one row.
    """
    longest = pad_sequence(list(rows), batch_first=True, padding_value=filling)
    missing = longest.new_full((len(rows), length - longest.shape[1], *longest.shape[2:]), filling)
    return torch.cat([longest, missing], 1)


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


def last_value(values: Tensor, mask: Tensor) -> Tensor:
    """The value at each row's last unmasked token, 0 in a row without one: [N, T] x 2 -> [N]."""
    return masked_sum(values, mask & (reverse_cumsum(mask.long()) == 1))


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


@dataclass(frozen=True)
class TokenLogps:
    """Per-token log-probs of N completions, padded to T. Everything is 0 where `mask` is False."""

    # [N, T] log pi(y_t | prompt, y_<t), with gradient in training.
    policy: Tensor
    # Name -> [N, T], never with gradient; "reference" anchors the KL.
    anchors: Mapping[str, Tensor]
    # [N, T] bool, True at trained tokens.
    mask: Tensor
    # [N, T] log-probs under the policy that sampled the tokens.
    behavior: Tensor | None = None
    # Name -> [N, T]: "entropy", "values" and the plan's statistics.
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    # [N] tokens that the mean over a completion is divided by: those of its whole episode, where
    # that was cut into several rows. None: its own, `lengths`.
    whole_lengths: Tensor | None = None

    @property
    def reference(self) -> Tensor:
        """The reference's log-probs [N, T]."""
        return self.anchors["reference"]

    @property
    def log_ratio(self) -> Tensor:
        """log policy - log reference per token [N, T]."""
        return self.policy - self.reference

    @property
    def lengths(self) -> Tensor:
        """Trained tokens per completion [N]."""
        return self.mask.sum(-1)

    @property
    def cut(self) -> bool:
        """Whether a row is one of several of an episode."""
        return self.whole_lengths is not None and bool((self.whole_lengths != self.lengths).any())

    def sequence(self, name: str = "policy") -> Tensor:
        """Sum over the trained tokens of `policy`, `behavior`, an anchor or an extra: [N]."""
        return masked_sum(self.get(name), self.mask)

    def get(self, name: str) -> Tensor:
        """`policy`, `behavior`, an anchor or an extra by name: [N, T]."""
        if name == "policy":
            return self.policy
        if name == "behavior":
            assert self.behavior is not None, "this batch has no behaviour log-probs"
            return self.behavior
        return self.anchors[name] if name in self.anchors else self.extras[name]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """`fn` applied to every tensor [N, T]; `whole_lengths` are left out."""
        return replace(
            self,
            policy=fn(self.policy),
            anchors={name: fn(values) for name, values in self.anchors.items()},
            mask=fn(self.mask),
            behavior=None if self.behavior is None else fn(self.behavior),
            extras={name: fn(values) for name, values in self.extras.items()},
            whole_lengths=None,
        )

    def select(self, index: Tensor) -> Self:
        """The completions at `index` [n]."""
        return self.map(lambda t: t[index])


@dataclass(frozen=True)
class Outputs:
    """What a reward or preference model gives for N whole completions: D numbers for each."""

    values: Tensor  # [N, D], with gradient when trained; D is `plan.outputs`
