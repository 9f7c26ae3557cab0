"""A key-value cache with spare room: transformers' dynamic layer copies the whole cache for every
token, this one seldom.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

_ROOM = 64  # tokens of spare room at least; it doubles with the length


def roomy_cache(config: Any, layer: "type[RoomyLayer]") -> DynamicCache:
    """The model's own cache with every plain full-attention layer replaced; sliding and recurrent
    layers stay.
    """
    cache = DynamicCache(config=config)
    cache.layers = [layer() if type(usual) is DynamicLayer else usual for usual in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):
    """`keys` and `values` [B, H, L, D] are views of the filled part of larger buffers."""

    buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B, H, new, D] to both; returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.keys.shape[-2] if self.keys.numel() else 0
        end = start + key_states.shape[-2]
        if self.buffers is None or end > self.buffers[0].shape[-2]:
            self.buffers = (
                self._grown(self.keys, key_states, end),
                self._grown(self.values, value_states, end),
            )
        keys, values = self.buffers
        keys[..., start:end, :] = key_states
        values[..., start:end, :] = value_states
        self.keys = keys[..., :end, :]
        self.values = values[..., :end, :]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these rows, repeats allowed."""
        super().reorder_cache(beam_idx)
        self.buffers = None

    def _grown(self, old: Tensor, new: Tensor, end: int) -> Tensor:
        rows, heads, _, width = new.shape
        room = torch.empty(
            (rows, heads, end + max(_ROOM, end // 2), width), dtype=new.dtype, device=new.device
        )
        if old.numel():
            room[..., : old.shape[-2], :] = old
        return room
