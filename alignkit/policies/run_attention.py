"""Attention of a packed row on a CPU, stretch by stretch: the kernels of torch's scaled-dot-product
attention over slices of the row's queries, keys and values.

Through autograd, each stretch would be cut out, copied and put back in both directions. One function
with a gradient of its own reads the slices where they lie, and adds the gradients where they belong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Keys that a stretch does not see are computed with those around them as long as that is cheaper than
# to copy the seen ones next to each other, forward and back: a copied key costs as much as this many
# pairs of a query and a key.
COPY = 20

forward_kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
backward_kernel: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Range = tuple[int, int]  # from the first index to before the second


@dataclass(frozen=True)
class Stretch:
    """Queries that are computed in one call, and the keys that they are computed with."""

    queries: Range
    keys: tuple[Range, ...]  # in ascending order
    bias: Tensor | None  # [1, 1, q, k], 0 where a query sees a key and -inf elsewhere; None: causal

    def of(self, tensor: Tensor) -> Tensor:
        """The keys or values [1, heads, L, D] of this stretch, [1, heads, k, D]; not copied where
        they are one range.
        """
        parts = [tensor[:, :, start:stop] for start, stop in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def joined(ranges: Sequence[Range], queries: int) -> tuple[Range, ...]:
    """Ranges of keys for so many queries, with the holes between them where these are small."""
    first = ranges[0][0]
    stop = ranges[-1][1]
    seen = sum(end - start for start, end in ranges)
    if queries * (stop - first - seen) <= COPY * seen:
        return ((first, stop),)

    # Neighbours are one range.
    result = [ranges[0]]
    for start, end in ranges[1:]:
        if start == result[-1][1]:
            result[-1] = (result[-1][0], end)
        else:
            result.append((start, end))
    return tuple(result)


class RunAttention(torch.autograd.Function):
    """Attention of all stretches: queries [1, heads, S, D], keys and values [1, heads, L, D] ->
    [1, S, heads, D].
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        stretches: Sequence[Stretch],
        scale: float | None,
    ) -> Tensor:
        _, heads, count, width = query.shape
        output = query.new_empty(1, count, heads, width)
        sums = []
        for stretch in stretches:
            start, stop = stretch.queries
            attended, log_sum = forward_kernel(
                query[:, :, start:stop],
                stretch.of(key),
                stretch.of(value),
                is_causal=stretch.bias is None,
                attn_mask=stretch.bias,
                scale=scale,
            )
            output[:, start:stop] = attended.transpose(1, 2)
            sums.append(log_sum)

        ctx.save_for_backward(query, key, value, output, *sums)
        ctx.stretches = stretches
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *sums = ctx.saved_tensors
        grad = grad.transpose(1, 2)
        output = output.transpose(1, 2)
        query_grad = torch.empty_like(query)
        key_grad = torch.zeros_like(key)
        value_grad = torch.zeros_like(value)
        for stretch, log_sum in zip(ctx.stretches, sums, strict=True):
            start, stop = stretch.queries
            query_part, key_part, value_part = backward_kernel(
                grad[:, :, start:stop],
                query[:, :, start:stop],
                stretch.of(key),
                stretch.of(value),
                output[:, :, start:stop],
                log_sum,
                0.0,
                stretch.bias is None,
                attn_mask=stretch.bias,
                scale=ctx.scale,
            )
            query_grad[:, :, start:stop] = query_part
            place = 0
            for first, last in stretch.keys:
                length = last - first
                key_grad[:, :, first:last] += key_part[:, :, place : place + length]
                value_grad[:, :, first:last] += value_part[:, :, place : place + length]
                place += length
        return query_grad, key_grad, value_grad, None, None
