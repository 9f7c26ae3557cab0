"""Where the bundles of an optimiser step come from when the data are fixed. Sampled data:
`alignkit.sources.rollouts`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from alignkit.batches import Bundle, Plan
from alignkit.errors import DataError


class Source(Protocol):
    """Where the bundles of a step come from; `metrics` describes the last collection, `state` goes
    into checkpoints.
    """

    metrics: dict[str, float]

    def collect(self, step: int, half: int) -> Sequence[Bundle]:
        """This rank's bundles of optimiser step `step`; `half` is 1 for the second collection of an
        extragradient step.
        """
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON that `load_state` needs to go on; called on every rank."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        ...


class Order:
    """The order in which `n` items are visited: one permutation per epoch, a pure function of
    (seed, position).

    Nothing to save, nothing to restore; the same for any number of processes.
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
            for position in range(window.start, window.stop)
        ]

    def _epoch(self, epoch: int) -> list[int]:
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            fresh = (
                torch.randperm(self.n, generator=generator).tolist()
                if self.shuffle
                else list(range(self.n))
            )
            self._epochs = {k: v for k, v in self._epochs.items() if k >= epoch - 1} | {
                epoch: fresh
            }
        return self._epochs[epoch]


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
        self.order = Order(len(bundles), seed, shuffle)
        self.rank = rank
        self.world = world
        self.metrics: dict[str, float] = {}

    def collect(self, step: int, half: int = 0) -> list[Bundle]:
        """This rank's bundles of optimiser step `step`."""
        batch = [
            self.bundles[i]
            for i in self.order[step * self.batch_size : (step + 1) * self.batch_size]
        ]
        self.metrics = {"epoch": round((step + 1) * self.batch_size / len(self.bundles), 4)}
        mine = batch[self.rank :: self.world]
        return mine + (with_shifted(batch)[self.rank :: self.world] if self.plan.mismatched else [])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Nothing: the order is a function of the step."""
        return {}, {}

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


def with_shifted(batch: Sequence[Bundle]) -> list[Bundle]:
    """Each prompt with the next row's completion: mismatched pairs, from which unpaired objectives
    estimate a baseline.

    Cached anchors belong to the matched pair and are dropped. A batch of one degenerates to the
    matched pair.
    """
    nexts = [*batch[1:], *batch[:1]]
    return [
        replace(b, completions=other.completions, masks=other.masks, tokens={}, mismatched=True)
        for b, other in zip(batch, nexts)
    ]
