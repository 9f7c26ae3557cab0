"""Bundles of fixed data, in a seeded order. Sampled data come from `alignkit.sources.rollouts`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import Bundle, Plan
from alignkit.data.mixture import Mixture
from alignkit.errors import DataError


class Order:
    """The order in which `n` items are visited: one permutation
    per epoch, a pure function of (seed, position).

    It needs no saving, and it is the same for any number of processes.
    """

    def __init__(self, n: int, seed: int, shuffle: bool = True):
        self.n = n
        self.seed = seed
        self.shuffle = shuffle
        self._epochs: dict[int, list[int]] = {}

    def __getitem__(self, window: slice) -> list[int]:
        """Items at positions [start, stop) of the endless sequence of epochs."""
        return [
            self._epoch(position // self.n)[position % self.n]
            for position in range(window.start or 0, window.stop)
        ]

    def _epoch(self, epoch: int) -> list[int]:
        if epoch not in self._epochs:
            items = self._items(epoch)

            # A window may reach back into the epoch before; older ones are forgotten.
            recent = {
                number: order for number, order in self._epochs.items() if number >= epoch - 1
            }
            self._epochs = {**recent, epoch: items}
        return self._epochs[epoch]

    def _items(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.n))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.n, generator=generator).tolist()


class MixedOrder(Order):
    """The order of several sources whose items stand one behind the other: each epoch visits
    `counts[i]` of the `sizes[i]` items of source i, mixed.

    Each source is gone through in permutations of its own, from one epoch into the next, so none of
    its items is visited again before all others were.
    """

    def __init__(self, sizes: Sequence[int], counts: Sequence[int], seed: int):
        super().__init__(sum(counts), seed)
        self.counts = counts
        self.starts = [0, *accumulate(sizes)]
        self.sources = [
            Order(size, seed + 104_729 * number) for number, size in enumerate(sizes, start=1)
        ]

    def _items(self, epoch: int) -> list[int]:
        items = [
            start + item
            for start, count, source in zip(self.starts, self.counts, self.sources)
            for item in source[epoch * count : (epoch + 1) * count]
        ]
        return [items[place] for place in super()._items(epoch)]


def order_of(mixture: Mixture[Any], seed: int) -> Order:
    """The order in which the rows of a mixture are visited."""
    if mixture.counts is None:
        return Order(len(mixture.rows), seed)
    return MixedOrder(mixture.sizes, mixture.counts, seed)


class DatasetSource:
    """Fixed bundles in a seeded order; each rank takes every world-th bundle of the global batch."""

    def __init__(
        self,
        bundles: Sequence[Bundle],
        plan: Plan,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        order: Order | None = None,
    ):
        if not bundles:
            raise DataError(
                "there are 0 rows to train on; see the data report above for what was dropped and why"
            )
        if batch_size < world:
            raise DataError(
                f"train.batch_size {batch_size} is smaller than the number of processes {world}"
            )

        self.bundles = bundles
        self.plan = plan
        self.batch_size = batch_size
        self.order = order or Order(len(bundles), seed, shuffle)
        self.rank = rank
        self.world = world
        self.metrics: dict[str, float] = {}

    def collect(self, step: int, half: int = 0) -> list[Bundle]:
        """This rank's bundles of optimiser step `step`."""
        first = step * self.batch_size
        batch = [self.bundles[i] for i in self.order[first : first + self.batch_size]]
        self.metrics = {"epoch": round((step + 1) * self.batch_size / self.order.n, 4)}

        mine = batch[self.rank :: self.world]
        if self.plan.mismatched:
            mine += with_shifted(batch)[self.rank :: self.world]
        return mine

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Nothing needs saving: the order is a function of the step."""
        return {}, {}

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


def with_shifted(batch: Sequence[Bundle]) -> list[Bundle]:
    """Each prompt with the next row's completions: mismatched pairs, from which unpaired objectives
    estimate a baseline.

    The last prompt gets the first row's completions, so that a batch of one keeps its own. Cached
    anchors belong to the matched pair and are dropped.
    """
    following = [*batch[1:], *batch[:1]]
    return [
        replace(
            bundle, completions=other.completions, masks=other.masks, tokens={}, mismatched=True
        )
        for bundle, other in zip(batch, following)
    ]
