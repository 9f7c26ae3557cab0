"""The tokens of a batch as they are drawn, and the samples that they become."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alignkit.errors import NumericsError
from alignkit.rollout.cached_model import CachedModel
from alignkit.rollout.kept import Keeper, Kept
from alignkit.rollout.protocol import Sample

# What a sample also has of every token where the sampler measures.
MEASURED = ("kl", "entropy", "reference_logps")


class Drawn:
    """The tokens of R rows as they are drawn, at most `rooms` [R] of each and `cap` of any."""

    def __init__(self, rooms: Tensor, cap: int, measured: bool) -> None:
        device = rooms.device
        shape = (len(rooms), cap)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        names = ["logps", *(MEASURED if measured else ())]
        self.numbers = {name: torch.zeros(shape, device=device) for name in names}
        self.lengths = rooms.clone()
        self.ended = torch.zeros(len(rooms), dtype=torch.bool, device=device)

    def put(self, rows: Tensor, position: int, tokens: Tensor, numbers: dict[str, Tensor]) -> None:
        """The tokens [L] of these rows at a position, with numbers about each of them."""
        self.tokens[rows, position] = tokens
        for name, values in numbers.items():
            self.numbers[name][rows, position] = values.float()

    def end(self, rows: Tensor, position: int) -> None:
        """The token at this position is the last of these rows."""
        self.lengths[rows] = position + 1
        self.ended[rows] = True

    def keep(
        self, keeper: Keeper, models: list[CachedModel], live: Tensor, running: Tensor
    ) -> None:
        """Keep the rows of `live` [L] that have ended before they leave the models."""
        if keeper.room:
            leaving = (self.ended[live] & ~running).nonzero()[:, 0]
            for place, row in zip(leaving.tolist(), live[leaving].tolist(), strict=True):
                keeper.keep(models, place, row, self.tokens[row, : self.lengths[row]])

    def samples(self, kept: Mapping[int, Kept]) -> list[Sample]:
        """One sample per row, with what was kept of some. NumericsError where log-probs are not finite."""
        tokens = self.tokens.cpu()
        numbers = {name: values.cpu() for name, values in self.numbers.items()}
        ends = zip(self.lengths.tolist(), self.ended.tolist(), strict=True)
        read = torch.arange(tokens.shape[1]) < self.lengths.cpu()[:, None]
        if not bool(torch.isfinite(numbers["logps"][read]).all()):
            raise NumericsError(
                "sampling: the model's log-probs are not finite; its weights or its logits hold nan "
                "or inf"
            )

        samples = []
        for row, (length, ended) in enumerate(ends):
            own: dict[str, Any] = {
                name: values[row, :length].clone() for name, values in numbers.items()
            }
            own["cached"] = kept.get(row)
            samples.append(Sample(tokens[row, :length].clone(), ended=ended, **own))
        return samples
