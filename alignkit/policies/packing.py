"""One row for many trees: no pads between bundles, and attention that computes what a token sees
and no more.

Scaled-dot-product attention pays for the square of a row and for every masked pair in it. So the
row is cut into *runs*, stretches of a tree without a branch; each run attends to the runs it grew
from and to itself, in a call of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

KERNEL = "alignkit_runs"  # the name under which transformers knows the attention below
FLEX = "flex_attention"
NARROW = 256  # models below this width gain nothing worth the counting
# what a call of the kernel costs beside its work, in query-key pairs of a model of width 1
CALL = 750_000


@dataclass(frozen=True)
class Run:
    """`size` tokens in a row without a branch between them, and the indices of the runs they grew
    from.
    """

    size: int
    ancestors: tuple[int, ...]

    def pairs(self, runs: Sequence["Run"]) -> int:
        """Query-key pairs that the kernel computes."""
        return self.size * (self.size + sum(runs[i].size for i in self.ancestors))


def find_runs(positions: Sequence[int], ends: Sequence[int]) -> list[Run]:
    """The runs of a row of trees written depth first; see `Rows` for the two lists."""
    starts = [
        i
        for i in range(len(ends))
        if i == 0 or ends[i] != ends[i - 1] or positions[i] != positions[i - 1] + 1
    ]
    runs: list[Run] = []
    above: list[int] = []
    for start, stop in zip(starts, [*starts[1:], len(ends)]):
        while above and ends[starts[above[-1]]] <= start:
            above.pop()
        runs.append(Run(stop - start, tuple(above)))
        above.append(len(runs) - 1)
    return runs


def beside(rows: int, longest: int, width: float) -> float:
    """What rows side by side cost, pads and masked pairs counted, in tokens without attention."""
    return rows * longest * (1 + longest / (6 * width)) + CALL / (6 * width**2)


def packed(tokens: int, pairs: float, calls: int, width: float) -> float:
    """What a row of runs costs, in tokens without attention.

    A token's matrix products (24 width^2 operations) cost as much as 6 width pairs of a query and a
    key (4 width each): on a CPU both run at about the same speed.
    """
    return tokens + pairs / (6 * width) + calls * CALL / (6 * width**2)


def pays(rows: Sequence[Sequence[Run]], width: float) -> bool:
    """Whether rows are cheaper as one row of runs than side by side, for a model of this width on a
    CPU.
    """
    lengths = [sum(run.size for run in row) for row in rows]
    pairs = sum(run.pairs(row) for row in rows for run in row)
    return packed(sum(lengths), pairs, sum(map(len, rows)), width) < beside(
        len(rows), max(lengths), width
    )


def default_budget(device: torch.device, packing: float | None) -> int:
    """Tokens of a forward where nobody says how many. On a CPU, trees that stand end to end have no
    pads to spread over more rows, and are as fast in small parts, which take less memory.
    """
    if device.type != "cpu":
        return 16384
    return 4096 if packing is None else 1024


class RunMask(Tensor):
    """Stands where a model hands a 4-D mask to its attention: it carries the runs, each with the
    mask of its pairs.
    """

    sizes: list[int]
    # per run its ancestors, and [q, k] bool (None: plain causal)
    seen: list[tuple[tuple[int, ...], Tensor | None]]


def run_mask(runs: Sequence[Run], positions: Tensor, window: int | None = None) -> RunMask:
    """The mask of a row [L] of runs. `window` counts positions, the token's own included."""
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool).as_subclass(RunMask)
    mask.sizes = [run.size for run in runs]
    mask.seen = []
    places = positions.split(mask.sizes)
    for run, own in zip(runs, places):
        if run.ancestors or (window is not None and run.size > window):
            keys = torch.cat([places[i] for i in run.ancestors] + [own])
            distance = own[:, None] - keys  # on the way to the root, positions are the order
            pairs = (distance >= 0) & (distance < (window or len(positions) + 1))
            mask.seen.append((run.ancestors, pairs[None, None]))
        else:
            mask.seen.append(((), None))
    return mask


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options,
) -> tuple[Tensor, None]:
    """transformers' attention: its SDPA kernel for each run [1, heads, L, D]; with any other mask
    that kernel itself.

    Runs attend in float32 at least, inside autocast too: a CPU's kernel for half precision is
    compiled for every new shape.
    """
    if not isinstance(attention_mask, RunMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    wide = [
        tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        for tensor in (query, key, value)
    ]
    queries, keys, values = (tensor.split(attention_mask.sizes, 2) for tensor in wide)
    parts = []
    with torch.autocast(query.device.type, enabled=False):
        for i, (ancestors, pairs) in enumerate(attention_mask.seen):
            seen = (*ancestors, i)
            k, v = (
                torch.cat([runs[j] for j in seen], 2) if ancestors else runs[i]
                for runs in (keys, values)
            )
            parts.append(sdpa_attention_forward(module, queries[i], k, v, pairs, **options)[0])
    return torch.cat(parts, 1).to(query.dtype), None


AttentionInterface.register(KERNEL, attend)
AttentionMaskInterface.register(KERNEL, sdpa_mask)


def take_runs(model: nn.Module) -> None:
    """Let a transformers model on a CPU that attends by SDPA take runs, if it can change its
    kernel.
    """
    if (
        model.config._attn_implementation == "sdpa"
        and model.device.type == "cpu"
        and model._can_set_attn_implementation()
    ):
        model.set_attn_implementation(KERNEL)


def packing_of(model: nn.Module) -> float | None:
    """What `build_rows` takes as `packing` for a model, None where rows stay side by side.

    Flex attention passes over what is not seen, so only pads count.
    """
    if model.config._attn_implementation == FLEX:
        return math.inf
    width = model.config.get_text_config().hidden_size
    return width if model.config._attn_implementation == KERNEL and width >= NARROW else None


def kernel_of(config) -> str:
    """The attention kernel of a model's config, by the name that loads it."""
    return "sdpa" if config._attn_implementation == KERNEL else config._attn_implementation
