"""A key-value cache with spare room: transformers' dynamic layer copies the whole cache for every
token, this one seldom.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

_ROOM = 64  # tokens of spare room at least; it doubles with the length


def roomy_cache(config: Any, layer: "type[RoomyLayer]", most: int) -> DynamicCache:
    """The model's own cache with every plain full-attention layer replaced by one of `most` tokens
    at most; sliding and recurrent layers stay.
    """
    cache = DynamicCache(config=config)
    cache.layers = [layer(most) if type(usual) is DynamicLayer else usual for usual in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):
    """`keys` and `values` [B, H, L, D] are views of the filled part of larger buffers, which never
    have room for more than `most` tokens.
    """

    buffers: tuple[Tensor, Tensor] | None = None

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B, H, new, D] to both; returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.filled()
        start = keys.shape[-2] if keys.numel() else 0
        end = start + key_states.shape[-2]

        if self.buffers is None or end > self.buffers[0].shape[-2]:
            self.buffers = (
                self._grown(keys, key_states, end),
                self._grown(values, value_states, end),
            )
        key_buffer, value_buffer = self.buffers
        key_buffer[..., start:end, :] = key_states
        value_buffer[..., start:end, :] = value_states

        self.keys = key_buffer[..., :end, :]
        self.values = value_buffer[..., :end, :]
        return self.keys, self.values

    def filled(self) -> tuple[Tensor, Tensor]:
        """Keys and values so far, [B, H, L, D] each."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def row(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values [H, L, D] of one row."""
        keys, values = self.filled()
        return keys[number], values[number]

    def begin(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Start with what was read before: keys and values [H, L, D] of each row, of any lengths L,
        with padding on the left.
        """
        keys, values = zip(*rows, strict=True)
        self.buffers = (self._padded(keys), self._padded(values))
        self.lazy_initialization(*self.buffers)
        width = max(row.shape[1] for row in keys)
        self.keys, self.values = (buffer[..., :width, :] for buffer in self.buffers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these rows, repeats allowed: copied once, into buffers that have room."""
        if not self.is_initialized:
            return
        keys, values = self.filled()
        length = keys.shape[-2]
        self.buffers = (self._buffer(keys, len(beam_idx)), self._buffer(values, len(beam_idx)))
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.buffers)
        torch.index_select(keys, 0, beam_idx, out=self.keys)
        torch.index_select(values, 0, beam_idx, out=self.values)

    def _buffer(self, like: Tensor, rows: int) -> Tensor:
        """An empty buffer for so many rows of `like` [B, H, L, D], with room for more than L tokens."""
        _, heads, length, width = like.shape
        room = min(max(_ROOM, length // 2), max(self.most - length, 0))
        shape = (rows, heads, length + room, width)
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def _grown(self, old: Tensor, new: Tensor, end: int) -> Tensor:
        """A buffer for `end` tokens and more, in the shape and dtype of `new` [B, H, new, D], that
        begins with `old`.
        """
        buffer = self._buffer(new[..., :1, :].expand(-1, -1, end, -1), len(new))
        if old.numel():
            buffer[..., : old.shape[-2], :] = old
        return buffer

    def _padded(self, rows: Sequence[Tensor]) -> Tensor:
        """A buffer with rows [H, L, D] of any lengths L, with zeros on their left."""
        width = max(row.shape[1] for row in rows)
        longest = next(row for row in rows if row.shape[1] == width)
        buffer = self._buffer(longest[None], len(rows))
        for place, row in zip(buffer, rows):
            blank = width - row.shape[1]
            place[:, :blank] = 0
            place[:, blank:width] = row
        return buffer
