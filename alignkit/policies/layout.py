"""Bundles become rows of tokens. The prompt is computed once and the completions branch off it.

A shared-prefix row holds `prompt | completion 1 | completion 2 | ...`: a tree written depth first.
Every token knows its position (its depth in the tree) and where its subtree ends; a token sees
another when it lies inside the other's subtree. Completions that begin alike share these tokens
too. A padded row is the same tree with one completion.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from alignkit.batches import Bundle
from alignkit.policies.packing import Run, beside, find_runs, packed, pays, run_mask

Layout = Literal["shared_prefix", "padded"]


@dataclass(frozen=True)
class Rows:
    """R rows of L tokens, and where the M trained tokens of N completions (padded to T) are found
    in them.
    """

    input_ids: Tensor  # [R, L] int64
    position_ids: Tensor  # [R, L] int64, depth in the row's tree
    ends: Tensor  # [R, L] int64, the index after the token's subtree: tokens index .. ends-1 see it
    branched: bool  # False: every row is one chain, plain causal attention is right
    # of the single row into which all were packed; None: rows lie side by side
    runs: tuple[Run, ...] | None
    sources: Tensor  # [M] int64 into R * L: the token whose hidden state predicts the label
    labels: Tensor  # [M] int64, the trained tokens
    targets: Tensor  # [M] int64 into N * T: where the label's figures belong
    shape: tuple[int, int]  # (N, T)

    def to(self, device: torch.device | str) -> "Rows":
        """The same rows on another device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def scatter(self, values: Tensor) -> Tensor:
        """Figures of the trained tokens [M] -> [N, T], 0 elsewhere; differentiable."""
        flat = values.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_put((self.targets,), values).view(self.shape)

    @property
    def mask(self) -> Tensor:
        """[N, T] bool, True at trained tokens."""
        return self.scatter(torch.ones_like(self.labels, dtype=torch.bool))


@dataclass
class _Row:
    """One row under construction."""

    ids: list[int]
    positions: list[int]
    ends: list[int]
    # per completion: the index of the prompt's end and of each of its input tokens
    paths: list[list[int]]


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))


def _row(prompt: list[int], inputs: list[list[int]]) -> _Row:
    """The tree of one prompt and its completions. Sorted, each completion shares the longest
    beginning with the one before.
    """
    start = len(prompt)
    row = _Row(list(prompt), list(range(start)), [0] * start, [[] for _ in inputs])
    previous: list[int] = []
    path: list[int] = []
    for k in sorted(range(len(inputs)), key=inputs.__getitem__):
        common = _shared(previous, inputs[k])
        new = len(inputs[k]) - common
        path = path[:common] + list(range(len(row.ids), len(row.ids) + new))
        row.ids += inputs[k][common:]
        row.positions += range(start + common, start + common + new)
        row.ends += [0] * new
        for index in path:
            row.ends[index] = len(row.ids)
        row.paths[k] = [start - 1, *path]
        previous = inputs[k]
    row.ends[:start] = [len(row.ids)] * start
    return row


def _used(mask: Tensor) -> int:
    """Input tokens of a completion that matter: all before its last trained token."""
    trained = mask.nonzero()
    return int(trained[-1]) if len(trained) else 0


def _padded(lists: Sequence[Sequence[int]], fill: Sequence[int] | None = None) -> Tensor:
    """Lists to one tensor [R, L]; pads take 0, or their own index + `fill`."""
    length = max(map(len, lists))
    return torch.tensor(
        [
            [*row, *((0,) * (length - len(row)) if fill is None else fill[len(row) : length])]
            for row in lists
        ]
    )


def build_rows(
    bundles: Sequence[Bundle],
    layout: Layout,
    device: torch.device | str = "cpu",
    *,
    packing: float | None = None,
) -> Rows:
    """Lay bundles out: one row per bundle (shared_prefix) or per completion (padded), right-padded
    to the longest.

    Tokens after a completion's last trained one are not computed, nor is its last token: nothing
    reads them. For models that take trees end to end the rows become a single one where that is
    cheaper. `packing` is their width, by which attention is weighed against the rest; inf where
    attention costs nothing beside it.
    """
    rows: list[_Row] = []
    where: list[tuple[int, list[int]]] = []  # per completion: its row and its path
    for bundle in bundles:
        prompt = bundle.prompt.tolist()
        inputs = [
            ids[: _used(mask)].tolist()
            for ids, mask in zip(bundle.completions, bundle.masks, strict=True)
        ]
        for group in [inputs] if layout == "shared_prefix" else [[ids] for ids in inputs]:
            row = _row(prompt, group)
            where += [(len(rows), path) for path in row.paths]
            rows.append(row)
    runs = _packed(rows, packing) if packing else None
    if runs:
        starts = list(accumulate((len(row.ids) for row in rows), initial=0))
        rows = [_end_to_end(rows)]
        where = [(0, [starts[r] + index for index in path]) for r, path in where]
    input_ids = _padded([row.ids for row in rows])
    length = input_ids.shape[1]
    completions = [ids for bundle in bundles for ids in bundle.completions]
    masks = [mask for bundle in bundles for mask in bundle.masks]
    longest = max(map(len, completions))
    sources = []
    targets = []
    labels = []
    for n, ((r, path), ids, mask) in enumerate(zip(where, completions, masks)):
        trained = mask.nonzero()[:, 0]
        sources.append(torch.tensor(path)[trained] + r * length)
        targets.append(trained + n * longest)
        labels.append(ids[trained])
    return Rows(
        input_ids,
        _padded([row.positions for row in rows], range(length)),
        _padded([row.ends for row in rows], range(1, length + 1)),
        any(end < len(row.ids) for row in rows for end in row.ends),
        runs,
        torch.cat(sources),
        torch.cat(labels),
        torch.cat(targets),
        (len(completions), longest),
    ).to(device)


def _packed(rows: Sequence[_Row], width: float) -> tuple[Run, ...] | None:
    """The runs of all rows end to end, or None where rows side by side are cheaper."""
    found = [find_runs(row.positions, row.ends) for row in rows]
    if not pays(found, width):
        return None
    firsts = accumulate(map(len, found), initial=0)
    return tuple(
        replace(run, ancestors=tuple(first + i for i in run.ancestors))
        for first, row in zip(firsts, found)
        for run in row
    )


def _end_to_end(rows: Sequence[_Row]) -> _Row:
    """The rows as one: a row of several trees."""
    whole = _Row([], [], [], [])
    for row in rows:
        whole.ends += [len(whole.ids) + end for end in row.ends]
        whole.ids += row.ids
        whole.positions += row.positions
    return whole


def visible(rows: Rows, window: int | None = None) -> Tensor:
    """Which token sees which: [R, 1, L, L] bool, query before key. `window` counts positions, the
    token's own included.
    """
    index = torch.arange(rows.input_ids.shape[1], device=rows.input_ids.device)
    seen = (index <= index[:, None]) & (index[:, None] < rows.ends[:, None, :])
    if window is not None:
        seen &= rows.position_ids[:, :, None] - rows.position_ids[:, None, :] < window
    return seen[:, None]


def block_mask(rows: Rows, window: int | None = None) -> BlockMask:
    """`visible` for flex attention, which passes over blocks in which nothing is seen."""
    ends = rows.ends
    depth = rows.position_ids

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = (key <= query) & (query < ends[row, key])
        return inside if window is None else inside & (depth[row, query] - depth[row, key] < window)

    count, length = ends.shape
    return create_block_mask(
        seen, count, None, length, length, device=ends.device, _compile=ends.is_cuda
    )


def attention_mask(
    rows: Rows,
    windows: Mapping[str, int | None],
    *,
    additive: torch.dtype | None,
    blocks: bool = False,
) -> Tensor | BlockMask | dict[str, Tensor | BlockMask]:
    """What a transformers model takes as `attention_mask` for these rows.

    `windows` names the mask of each layer type; the single key "" stands for a model that takes one
    mask. Rows without branches get an all-ones [R, L], so the model's own (faster) causal path
    runs: pads follow the tokens and are never seen. `additive` is the dtype of a mask that is added
    to the scores (eager attention), None for a boolean one; `blocks` asks for flex attention's
    kind.
    """
    if not rows.branched:
        return torch.ones_like(rows.input_ids)
    built: dict[int | None, Tensor | BlockMask] = {}
    for window in dict.fromkeys(windows.values()):
        if blocks:
            built[window] = block_mask(rows, window)
        elif rows.runs:
            built[window] = run_mask(rows.runs, rows.position_ids[0], window)
        else:
            seen = visible(rows, window)
            built[window] = (
                seen
                if additive is None
                else torch.zeros_like(seen, dtype=additive).masked_fill(
                    ~seen, torch.finfo(additive).min
                )
            )
    masks = {name: built[window] for name, window in windows.items()}
    return masks.get("", masks)


def computed_tokens(bundle: Bundle, layout: Layout) -> list[int]:
    """Row lengths of a bundle under a layout (an upper bound: completions that begin alike share
    more).
    """
    used = [_used(mask) for mask in bundle.masks]
    prompt = len(bundle.prompt)
    return [prompt + sum(used)] if layout == "shared_prefix" else [prompt + n for n in used]


def stand_in() -> Bundle:
    """The smallest bundle there is, for a rank that has to take part in a forward without rows of
    its own.
    """
    return Bundle(
        torch.zeros(1, dtype=torch.long),
        [torch.zeros(1, dtype=torch.long)],
        [torch.ones(1, dtype=torch.bool)],
    )


def micro_batches(
    bundles: Sequence[Bundle],
    budget: int,
    layout: Layout,
    *,
    packing: float | None = None,
    overhead: int = 128,
) -> list[list[int]]:
    """Indices of the bundles of each forward: its tokens, pads counted, stay within `budget`.

    Bundles are sorted by length and cut where that computes fewest tokens, a forward and backward
    of their own costing as much as `overhead` tokens; every bundle appears once. One that exceeds
    the budget by itself gets a forward of its own. `packing`: see `build_rows`.
    """
    rows = [computed_tokens(bundle, layout) for bundle in bundles]
    order = sorted(range(len(bundles)), key=lambda i: (-max(rows[i]), i))
    longest = np.array([max(rows[i]) for i in order])
    counts, sizes = (np.cumsum([0, *(measure(rows[i]) for i in order)]) for measure in (len, sum))
    prices = np.cumsum(
        [0, *(round(_packed_price(bundles[i], layout, packing)) if packing else 0 for i in order)]
    )
    # per number of bundles placed: the least cost, and where its last group begins
    best = np.zeros(len(order) + 1)
    cut = [0] * (len(order) + 1)
    low = 0
    for stop in range(1, len(order) + 1):
        while low < stop - 1 and sizes[stop] - sizes[low] > budget:
            low += 1
        count = counts[stop] - counts[low:stop]
        total = sizes[stop] - sizes[low:stop]
        width = longest[low:stop]
        tokens = count * width
        cost = (count * width).astype(float)
        if packing:
            price = prices[stop] - prices[low:stop]
            cost = beside(count, width, packing)
            tokens = np.where(price < cost, total, tokens)
            cost = np.minimum(price, cost)
        over = np.flatnonzero(tokens[:-1] > budget)
        first = over[-1] + 1 if len(over) else 0
        options = best[low + first : stop] + cost[first:] + overhead
        cut[stop] = low + first + int(options.argmin())
        best[stop] = options.min()
    groups: list[list[int]] = []
    stop = len(order)
    while stop:
        groups.append(order[cut[stop] : stop])
        stop = cut[stop]
    return groups[::-1]


def _packed_price(bundle: Bundle, layout: Layout, width: float) -> float:
    """What `packed` says of a bundle, as if its completions shared no beginning."""
    rows = computed_tokens(bundle, layout)
    prompt = len(bundle.prompt)
    if layout == "padded":
        return packed(sum(rows), sum(n * n for n in rows), len(rows), width)
    used = [_used(mask) for mask in bundle.masks]
    return packed(sum(rows), prompt**2 + sum(n * (n + prompt) for n in used), 1 + len(used), width)
