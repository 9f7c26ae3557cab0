"""Bundles become rows of tokens. The prompt is computed once and the completions branch off it.

A shared-prefix row holds `prompt | completion 1 | completion 2 | ...`: a tree written depth first.
Every token knows its position (its depth in the tree) and where its subtree ends; a token sees
another when it lies inside the other's subtree. Completions that begin alike share these tokens
too. A padded row is the same tree with one completion.

`build_rows` lays bundles out, `attention_mask` gives the mask that a transformers model needs for
these rows, and `micro_batches` divides the bundles of a step into forwards.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from alignkit.batches import Bundle
from alignkit.policies.packing import CostModel, Run, find_runs, pays, run_mask

Layout = Literal["shared_prefix", "padded"]


@dataclass(frozen=True)
class Rows:
    """R rows of L tokens, and where the M trained tokens of N completions (padded to T) are."""

    input_ids: Tensor  # [R, L] int64
    position_ids: Tensor  # [R, L] int64, depth in the row's tree
    lengths: Tensor  # [R] int64, tokens without the pads behind them
    ends: Tensor  # [R, L] int64, the index after the token's subtree: tokens index .. ends-1 see it
    branched: bool  # False: every row is one chain, plain causal attention is right
    runs: tuple[Run, ...] | None  # of the one row into which all were packed; None: not packed
    sources: Tensor  # [M] int64 into R * L: the token whose hidden state predicts the label
    labels: Tensor  # [M] int64, the trained tokens
    targets: Tensor  # [M] int64 into N * T: where the label's statistics belong
    shape: tuple[int, int]  # (N, T)

    def to(self, device: torch.device | str) -> "Rows":
        """The same rows on another device."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def scatter(self, values: Tensor) -> Tensor:
        """One value per trained token [M] -> [N, T], 0 elsewhere; differentiable."""
        flat = values.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_put((self.targets,), values).view(self.shape)

    @property
    def mask(self) -> Tensor:
        """[N, T] bool, True at trained tokens."""
        return self.scatter(torch.ones_like(self.labels, dtype=torch.bool))


@dataclass
class _Tree:
    """A row under construction."""

    ids: list[int]
    positions: list[int]
    ends: list[int]
    # Per completion: the index of the prompt's last token, then of each of its input tokens.
    paths: list[list[int]]


def _tree(prompt: list[int], inputs: list[list[int]]) -> _Tree:
    """The tree of one prompt and the input tokens of its completions."""
    start = len(prompt)
    tree = _Tree(list(prompt), list(range(start)), [0] * start, [[] for _ in inputs])

    # In sorted order, each completion shares its longest beginning with the one before it.
    previous: list[int] = []
    path: list[int] = []
    for k in sorted(range(len(inputs)), key=inputs.__getitem__):
        shared = _shared_length(previous, inputs[k])
        new_ids = inputs[k][shared:]
        first_new = len(tree.ids)
        path = path[:shared] + list(range(first_new, first_new + len(new_ids)))

        tree.ids += new_ids
        tree.positions += range(start + shared, start + len(inputs[k]))
        tree.ends += [0] * len(new_ids)
        # The subtree of every token on the way now reaches to here.
        for index in path:
            tree.ends[index] = len(tree.ids)

        tree.paths[k] = [start - 1, *path]
        previous = inputs[k]

    tree.ends[:start] = [len(tree.ids)] * start
    return tree


def _shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both begin with."""
    length = 0
    for one, other in zip(first, second):
        if one != other:
            break
        length += 1
    return length


def used_tokens(mask: Tensor) -> int:
    """Input tokens of a completion that matter: all before its last trained token."""
    trained = mask.numpy().nonzero()[0]
    return int(trained[-1]) if len(trained) else 0


def _trees(bundle: Bundle, layout: Layout) -> list[_Tree]:
    """The rows of a bundle: one with all its completions, or one per completion.

    A completion's last token, and what follows its last trained token, is not computed: nothing
    reads it.
    """
    prompt = bundle.prompt.tolist()
    inputs = [
        ids[: used_tokens(mask)].tolist()
        for ids, mask in zip(bundle.completions, bundle.masks, strict=True)
    ]
    if layout == "shared_prefix":
        return [_tree(prompt, inputs)]
    return [_tree(prompt, [ids]) for ids in inputs]


def build_rows(
    bundles: Sequence[Bundle],
    layout: Layout,
    device: torch.device | str = "cpu",
    *,
    packing: float | None = None,
) -> Rows:
    """Lay bundles out: one row per bundle (shared_prefix) or per completion (padded), right-padded
    to the longest.

    `packing` is the width of the model's `CostModel`, for models whose attention takes a packed
    row: all rows become a single one where that is cheaper. None never packs.
    """
    trees = [tree for bundle in bundles for tree in _trees(bundle, layout)]
    # For each completion, in the order of the bundles: its row and its path through the row.
    places = [(row, path) for row, tree in enumerate(trees) for path in tree.paths]

    runs = _runs_if_cheaper(trees, packing) if packing else None
    if runs:
        starts = list(accumulate((len(tree.ids) for tree in trees), initial=0))
        places = [(0, [starts[row] + index for index in path]) for row, path in places]
        trees = [_end_to_end(trees)]

    completions = [ids for bundle in bundles for ids in bundle.completions]
    length = max(len(tree.ids) for tree in trees)
    longest = max(len(ids) for ids in completions)

    # The trained tokens [M] among those of all completions, whose they are, and which of its own.
    trained = torch.cat([mask for bundle in bundles for mask in bundle.masks]).nonzero()[:, 0]
    sizes = torch.tensor([len(ids) for ids in completions])
    owner = torch.arange(len(sizes)).repeat_interleave(sizes)[trained]
    index = trained - (sizes.cumsum(0) - sizes)[owner]

    # A label is predicted by the token before it: the path at the label's own index.
    paths = torch.tensor([row * length + place for row, path in places for place in path])
    begins = list(accumulate((len(path) for _, path in places), initial=0))

    # A pad sees itself alone: its subtree ends right after it. It stands at position 0, because a row
    # with branches may have more tokens than the model has positions.
    rows = Rows(
        input_ids=_stacked([tree.ids for tree in trees], [0] * length),
        position_ids=_stacked([tree.positions for tree in trees], [0] * length),
        lengths=torch.tensor([len(tree.ids) for tree in trees]),
        ends=_stacked([tree.ends for tree in trees], range(1, length + 1)),
        branched=any(end < len(tree.ids) for tree in trees for end in tree.ends),
        runs=runs,
        sources=paths[torch.tensor(begins)[owner] + index],
        labels=torch.cat(completions)[trained],
        targets=owner * longest + index,
        shape=(len(completions), longest),
    )
    return rows.to(device)


def _stacked(lists: Sequence[Sequence[int]], pads: Sequence[int]) -> Tensor:
    """Lists under one another, [R, L]; a shorter one continues with `pads` [L] at its places."""
    return torch.tensor([[*values, *pads[len(values) :]] for values in lists])


def _runs_if_cheaper(trees: Sequence[_Tree], width: float) -> tuple[Run, ...] | None:
    """The runs of all trees end to end, or None where rows side by side are cheaper."""
    runs_of = [find_runs(tree.positions, tree.ends) for tree in trees]
    if not pays(runs_of, width):
        return None

    # In the packed row, a tree's runs are counted on from those of the trees before it.
    runs: list[Run] = []
    for tree_runs in runs_of:
        first = len(runs)
        for run in tree_runs:
            runs.append(replace(run, ancestors=tuple(first + i for i in run.ancestors)))
    return tuple(runs)


def _end_to_end(trees: Sequence[_Tree]) -> _Tree:
    """The trees as one row; positions start anew with each."""
    whole = _Tree([], [], [], [])
    for tree in trees:
        whole.ends += [len(whole.ids) + end for end in tree.ends]
        whole.ids += tree.ids
        whole.positions += tree.positions
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
    read: Tensor | None = None,
) -> Tensor | BlockMask | dict[str, Tensor | BlockMask]:
    """What a transformers model takes as `attention_mask` for these rows.

    `windows` names the mask of each layer type; the single key "" stands for a model that takes one
    mask. Rows without branches get an all-ones [R, L], so the model's own (faster) causal path
    runs: pads follow the tokens and are never seen. `additive` is the dtype of a mask that is added
    to the scores (eager attention), None for a boolean one; `blocks` asks for flex attention's
    kind. `read`: see `run_mask`.
    """
    if not rows.branched:
        return torch.ones_like(rows.input_ids)

    # Layer types with the same window share a mask.
    built: dict[int | None, Tensor | BlockMask] = {}
    for window in dict.fromkeys(windows.values()):
        if blocks:
            built[window] = block_mask(rows, window)
        elif rows.runs:
            built[window] = run_mask(rows.runs, rows.position_ids[0], window, read)
        elif additive is None:
            built[window] = visible(rows, window)
        else:
            hidden = ~visible(rows, window)
            lowest = torch.finfo(additive).min
            built[window] = torch.zeros_like(hidden, dtype=additive).masked_fill(hidden, lowest)
    masks = {name: built[window] for name, window in windows.items()}
    return masks.get("", masks)


def computed_tokens(bundle: Bundle, layout: Layout) -> list[int]:
    """Row lengths of a bundle under a layout (an upper bound:
    completions that begin alike share more).
    """
    used = [used_tokens(mask) for mask in bundle.masks]
    prompt = len(bundle.prompt)
    return [prompt + sum(used)] if layout == "shared_prefix" else [prompt + n for n in used]


def stand_in() -> Bundle:
    """The smallest possible bundle, for a rank that has to take
    part in a forward without rows of its own.
    """
    token = torch.zeros(1, dtype=torch.long)
    return Bundle(token, [token], [torch.ones(1, dtype=torch.bool)])


def micro_batches(
    bundles: Sequence[Bundle],
    budget: int,
    layout: Layout,
    *,
    packing: float | None = None,
    overhead: int = 128,
) -> list[list[int]]:
    """Divide bundles into forwards of at most `budget` tokens, pads counted; the indices of each.

    Bundles are sorted by length and cut where that computes the fewest tokens. A forward and
    backward of their own cost as much as `overhead` tokens. Every bundle appears once; one that
    exceeds the budget by itself gets a forward of its own. `packing`: see `build_rows`.
    """
    lengths = [computed_tokens(bundle, layout) for bundle in bundles]
    order = sorted(range(len(bundles)), key=lambda i: (-max(lengths[i]), i))
    cost = CostModel(packing) if packing else None
    groups = _Groups(
        longest=np.array([max(lengths[i]) for i in order]),
        rows=_running_sum(len(lengths[i]) for i in order),
        tokens=_running_sum(sum(lengths[i]) for i in order),
        packed=_running_sum(
            round(_packed_cost(bundles[i], layout, cost)) if cost else 0 for i in order
        ),
        cost=cost,
    )
    cuts = [0, *groups.cheapest_cuts(budget, overhead)]
    return [order[start:stop] for start, stop in pairwise(cuts)]


@dataclass(frozen=True)
class _Groups:
    """Sizes of n bundles, longest first, and what groups of neighbouring ones cost.

    A group start..stop is as wide as its first bundle. The sums run over the bundles before each,
    so that a group's own is a difference of two.
    """

    longest: np.ndarray  # [n] the longest row of each bundle
    rows: np.ndarray  # [n + 1] rows of the bundles before
    tokens: np.ndarray  # [n + 1] tokens without pads
    packed: np.ndarray  # [n + 1] what they cost in a packed row
    cost: CostModel | None  # None: rows are never packed

    def ending_at(self, stop: int, first: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (with pads) and cost of the groups start..stop, for start in first..stop-1."""
        rows = self.rows[stop] - self.rows[first:stop]
        width = self.longest[first:stop]
        padded_tokens = rows * width
        if self.cost is None:
            return padded_tokens, padded_tokens.astype(float)

        # With packing, whichever is cheaper, as `build_rows` will decide.
        packed_tokens = self.tokens[stop] - self.tokens[first:stop]
        packed = self.packed[stop] - self.packed[first:stop]
        padded = self.cost.padded(rows, width)
        tokens = np.where(packed < padded, packed_tokens, padded_tokens)
        return tokens, np.minimum(packed, padded)

    def cheapest_cuts(self, budget: int, overhead: int) -> list[int]:
        """Where to end each group so that the total cost is least, by dynamic programming."""
        count = len(self.longest)
        # Of the first `stop` bundles: the least cost, and where their last group begins.
        best = np.zeros(count + 1)
        last_start = [0] * (count + 1)
        first = 0
        for stop in range(1, count + 1):
            # Without pads these are too many tokens already, for this stop and all later ones.
            while first < stop - 1 and self.tokens[stop] - self.tokens[first] > budget:
                first += 1
            tokens, cost = self.ending_at(stop, first)

            # A bundle alone is allowed whatever its size; longer groups have to fit.
            too_large = np.flatnonzero(tokens[:-1] > budget)
            skipped = too_large[-1] + 1 if len(too_large) else 0
            options = best[first + skipped : stop] + cost[skipped:] + overhead
            last_start[stop] = first + skipped + int(options.argmin())
            best[stop] = options.min()

        cuts = []
        stop = count
        while stop:
            cuts.append(stop)
            stop = last_start[stop]
        return cuts[::-1]


def _running_sum(values: Iterable[int]) -> np.ndarray:
    """Sums of the values before each: n numbers -> [n + 1]."""
    return np.cumsum([0, *values])


def _packed_cost(bundle: Bundle, layout: Layout, cost: CostModel) -> float:
    """What a bundle costs in a packed row, as if its completions shared no beginning."""
    lengths = computed_tokens(bundle, layout)
    if layout == "padded":
        return cost.packed(sum(lengths), sum(n * n for n in lengths), len(lengths))

    # The prompt is one run, and each completion is another that also sees the prompt.
    prompt = len(bundle.prompt)
    used = [used_tokens(mask) for mask in bundle.masks]
    pairs = prompt**2 + sum(n * (n + prompt) for n in used)
    return cost.packed(sum(lengths), pairs, 1 + len(used))
