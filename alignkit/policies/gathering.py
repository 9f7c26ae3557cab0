"""How a unit of shards is put together on a CPU."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class GatheredInPlace:
    """How `fully_shard` gathers a unit on a CPU. Left to itself, gloo takes the unit's memory once
    more for a while, and what arrived for the unit before is kept until the next one is there.
    """

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the unit as it arrives."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> dist.Work | None:
        """Every process's part goes to its place in all of them; `input_tensor` is in its place. What
        is returned is done: torch then gives the memory up as soon as it is copied.
        """
        works = [
            dist.broadcast(part, group=group, group_src=rank, async_op=True)
            for rank, part in enumerate(output_tensor.chunk(group.size()))
        ]
        for work in works:
            work.wait()
        return works[-1]
