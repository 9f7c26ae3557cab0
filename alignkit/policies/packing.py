"""Packing: one row for many trees, without pads, and without attention between separate branches.

A tree is a prompt with its completions, as `alignkit.policies.layout` describes it. Scaled-dot-
product attention computes all pairs of tokens of a row, those that the mask forbids included. So a
packed row is cut into *runs*, stretches of a tree without a branch. Each run attends to the runs it
grew from and to itself, in a kernel call of its own. `CostModel` says when that is cheaper than
padded rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alignkit.policies.run_attention import Range, RunAttention, Stretch, joined

KERNEL = "alignkit_runs"  # the name under which transformers knows the attention below
FLEX = "flex_attention"
NARROW = 256  # models with a smaller hidden size gain too little from packing

# What a kernel call costs beside its work, in query-key pairs of a model of width 1.
CALL = 750_000

Number = TypeVar("Number", float, np.ndarray)


@dataclass(frozen=True)
class Run:
    """A stretch of a tree without a branch."""

    size: int  # tokens
    ancestors: tuple[int, ...]  # indices of the runs it grew from, the root's first

    def pairs(self, runs: Sequence["Run"]) -> int:
        """Query-key pairs that the kernel computes."""
        return self.size * (self.size + sum(runs[i].size for i in self.ancestors))


def find_runs(positions: Sequence[int], ends: Sequence[int]) -> list[Run]:
    """The runs of a row of trees written depth first; see `Rows` for the two lists."""
    # A run continues as long as the next token is a child whose subtree ends where its own does.
    starts = [
        i
        for i in range(len(ends))
        if i == 0 or ends[i] != ends[i - 1] or positions[i] != positions[i - 1] + 1
    ]

    runs: list[Run] = []
    ancestors: list[int] = []
    for start, stop in zip(starts, [*starts[1:], len(ends)]):
        while ancestors and ends[starts[ancestors[-1]]] <= start:
            ancestors.pop()
        runs.append(Run(stop - start, tuple(ancestors)))
        ancestors.append(len(runs) - 1)
    return runs


@dataclass(frozen=True)
class CostModel:
    """What a forward costs on a CPU, counted in tokens that pass through a model without attention.

    A token's matrix products take 24 width^2 operations per layer, a pair of a query and a key
    4 width. On a CPU both run at about the same speed, so 6 width pairs cost as much as a token.
    """

    width: float  # the model's hidden size; infinite where attention costs nothing beside the rest

    def padded(self, rows: Number, longest: Number) -> Number:
        """Rows side by side, each padded to the longest: pads and masked pairs are computed too."""
        attention = longest / (6 * self.width)
        return rows * longest * (1 + attention) + CALL / (6 * self.width**2)

    def packed(self, tokens: int, pairs: float, calls: int) -> float:
        """One row of runs: each run is a kernel call, which computes its own pairs only."""
        return tokens + pairs / (6 * self.width) + calls * CALL / (6 * self.width**2)


def pays(rows: Sequence[Sequence[Run]], width: float) -> bool:
    """Whether rows, given as their runs, are cheaper packed than padded, for a model of this hidden
    size on a CPU.
    """
    cost = CostModel(width)
    lengths = [sum(run.size for run in row) for row in rows]
    pairs = sum(run.pairs(row) for row in rows for run in row)
    calls = sum(len(row) for row in rows)
    return cost.packed(sum(lengths), pairs, calls) < cost.padded(float(len(rows)), max(lengths))


def default_budget(device: torch.device, packing: float | None) -> int:
    """Tokens of a forward where the recipe leaves `train.micro_batch_tokens` at auto.

    Packed rows have no pads, so on a CPU they are as fast in small parts, which take less memory.
    """
    if device.type != "cpu":
        return 16384
    return 4096 if packing is None else 1024


class RunMask(Tensor):
    """Stands where a model hands a 4-D mask to its attention: it carries the stretches of queries,
    one for each run in which a token asks.
    """

    stretches: list[Stretch]
    # For a model's last layer: the tokens that are read after it [S], and the mask of their queries.
    read: Tensor | None = None
    last: "RunMask | None" = None


def run_mask(
    runs: Sequence[Run],
    positions: Tensor,
    window: int | None = None,
    read: Tensor | None = None,
) -> RunMask:
    """The mask of a row [L] of runs. `window` counts positions, the token's own included. `read` are
    the indices [S], in ascending order, of the tokens whose last hidden states something reads.
    """
    mask = _run_mask(runs, positions, window, torch.arange(len(positions)))
    if read is not None:
        mask.read = read
        mask.last = _run_mask(runs, positions, window, read)
    return mask


def _run_mask(
    runs: Sequence[Run], positions: Tensor, window: int | None, asking: Tensor
) -> RunMask:
    """The same for the queries of the tokens `asking` [S] alone."""
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool).as_subclass(RunMask)
    mask.stretches = []
    ends = list(accumulate(run.size for run in runs))
    ranges = [(end - run.size, end) for run, end in zip(runs, ends)]
    cuts = torch.searchsorted(asking, torch.tensor([0, *ends])).tolist()
    for i, run in enumerate(runs):
        queries = (cuts[i], cuts[i + 1])
        places = asking[slice(*queries)]
        is_whole = len(places) == run.size
        if is_whole and not run.ancestors and (window is None or run.size <= window):
            mask.stretches.append(Stretch(queries, (ranges[i],), None))
        elif len(places):
            seen = [ranges[j] for j in (*run.ancestors, i)]
            keys = joined(seen, len(places))
            bias = _bias(positions, places, seen, keys, window)
            mask.stretches.append(Stretch(queries, keys, bias))
    return mask


def _bias(
    positions: Tensor,
    places: Tensor,
    seen: Sequence[Range],
    keys: Sequence[Range],
    window: int | None,
) -> Tensor:
    """What is added to the scores of the tokens `places` [q] and of those in `keys`, of which they
    see those in `seen` that come before them and within the window: [1, 1, q, k].
    """
    # Positions only grow on the way from the root, so they say what comes before what.
    belongs = torch.zeros(len(positions), dtype=torch.bool)
    for start, stop in seen:
        belongs[start:stop] = True
    index = torch.cat([torch.arange(start, stop) for start, stop in keys])
    distance = positions[places][:, None] - positions[index]
    pairs = (distance >= 0) & (distance < (window or len(positions) + 1)) & belongs[index]
    return torch.zeros(pairs.shape).masked_fill_(~pairs, -math.inf)[None, None]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, [1, heads, L, D] in: run by run where the mask is a
    `RunMask`, and transformers' own SDPA with any other mask.
    """
    if not isinstance(attention_mask, RunMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    # In float32 at least, inside autocast too: a CPU compiles its half-precision kernel anew for
    # every shape.
    wide = torch.promote_types(query.dtype, torch.float32)
    wide_query, wide_key, wide_value = (tensor.to(wide) for tensor in (query, key, value))
    stretches = attention_mask.stretches
    if wide != torch.float32:
        stretches = [
            replace(stretch, bias=None if stretch.bias is None else stretch.bias.to(wide))
            for stretch in stretches
        ]

    with torch.autocast(query.device.type, enabled=False):
        if _is_plain(wide_query, wide_value, options):
            groups = query.shape[1] // key.shape[1]
            output = RunAttention.apply(  # type: ignore[no-untyped-call]
                wide_query,
                repeat_kv(wide_key, groups),
                repeat_kv(wide_value, groups),
                stretches,
                options.get("scaling"),
            )
            return output.to(query.dtype), None

        # With dropout, a position bias and the like, as transformers has it.
        parts = []
        for stretch in stretches:
            asking = wide_query[:, :, slice(*stretch.queries)]
            parts.append(
                sdpa_attention_forward(
                    module,
                    asking,
                    stretch.of(wide_key),
                    stretch.of(wide_value),
                    stretch.bias,
                    **options,
                )[0]
            )
    return torch.cat(parts, 1).to(query.dtype), None


def _is_plain(query: Tensor, value: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether attention is softmax(q k scale) v, and the kernel's tensors have the right shapes."""
    further = ("dropout", "softcap", "position_bias", "cache", "output_attentions", "s_aux")
    is_causal = options.get("is_causal") in (None, True)
    has_more = any(name in options and options[name] not in (None, False, 0.0) for name in further)
    return is_causal and not has_more and query.shape[-1] == value.shape[-1]


AttentionInterface.register(KERNEL, attend)
AttentionMaskInterface.register(KERNEL, sdpa_mask)


def take_runs(model: Any) -> None:
    """Let a transformers model on a CPU that attends by SDPA take
    runs, if it can change its attention kernel.
    """
    if (
        model.config._attn_implementation == "sdpa"
        and model.device.type == "cpu"
        and model._can_set_attn_implementation()
    ):
        model.set_attn_implementation(KERNEL)


def packing_of(model: Any) -> float | None:
    """The `packing` of a transformers model: the width of its `CostModel`, or None where its rows
    are never packed.
    """
    kernel = model.config._attn_implementation
    if kernel == FLEX:
        return math.inf  # flex attention skips what is not seen, so only pads count
    width: int = model.config.get_text_config().hidden_size
    return width if kernel == KERNEL and width >= NARROW else None


def kernel_of(config: Any) -> str:
    """The attention kernel of a model's config, by the name that loads it."""
    return "sdpa" if config._attn_implementation == KERNEL else str(config._attn_implementation)
