"""A prompt's keys and values once for all of its completions, while sampling on a CPU.

Attention of a decode step waits for what it reads from the cache. Completions of one prompt see the
same keys there, so all their queries meet them in one product.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alignkit.policies.packing import NARROW, kernel_of
from alignkit.rollout.kv_cache import RoomyLayer

KERNEL = "alignkit_branches"  # the name under which transformers knows the attention below


class Prompts:
    """Keys and values [U, H, P, D] of prompts, and the row of each completion (`owner` [R], into
    U).

    Queries of one prompt are laid side by side, as many places for each prompt as the one with most
    completions needs.
    """

    def __init__(self, keys: Tensor, values: Tensor, owner: Tensor) -> None:
        kept, self.owner, counts = owner.unique(return_inverse=True, return_counts=True)
        whole = len(kept) == len(keys)
        self.keys, self.values = (keys, values) if whole else (keys[kept], values[kept])
        order = self.owner.argsort(stable=True)
        self.places = int(counts.max())
        rank = torch.empty_like(order)
        rank[order] = (
            torch.arange(len(order), device=order.device)
            - (counts.cumsum(0) - counts)[self.owner[order]]
        )
        self.slots = self.owner * self.places + rank  # [R] into U * places
        self.in_order = len(order) == len(kept) * self.places and torch.equal(order, self.slots)

    def taken(self, rows: Tensor) -> "Prompts":
        """The prompts of these completions."""
        return Prompts(self.keys, self.values, self.owner[rows])

    def grouped(self, figures: Tensor) -> Tensor:
        """[R, H, G, E] -> [U, H, places * G, E], 0 at places without a completion."""
        placed = figures
        if not self.in_order:
            placed = figures.new_zeros(len(self.keys) * self.places, *figures.shape[1:])
            placed[self.slots] = figures
        return placed.unflatten(0, (-1, self.places)).transpose(1, 2).flatten(2, 3)

    def single(self, figures: Tensor) -> Tensor:
        """The other way: [U, H, places * G, E] -> [R, H, G, E]."""
        placed = figures.unflatten(2, (self.places, -1)).transpose(1, 2).flatten(0, 1)
        return placed if self.in_order else placed[self.slots]


class BranchKeys(Tensor):
    """Keys [R, H, t, D] of the completions, where a model hands keys to its attention; `prompt` has
    the rest.
    """

    prompt: Prompts


class BranchingLayer(RoomyLayer):
    """A cache layer of prompts from which completions branch off: then `keys` and `values` are the
    completions' own.

    The first `reorder_cache` that takes more rows than there are prompts begins the branches.
    """

    prompt: Prompts | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `RoomyLayer`; keys are `BranchKeys` once there are branches."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.prompt is not None:
            keys = keys.as_subclass(BranchKeys)
            keys.prompt = self.prompt
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens that the next one sees, the prompt's included."""
        return super().get_seq_length() + (0 if self.prompt is None else self.prompt.keys.shape[-2])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these rows, repeats allowed."""
        if self.prompt is not None:
            self.prompt = self.prompt.taken(beam_idx)
        elif len(beam_idx) > len(self.keys):
            self.prompt = Prompts(self.keys, self.values, beam_idx)
            self.keys, self.values = (
                old.new_empty(len(beam_idx), old.shape[1], 0, old.shape[3])
                for old in (self.keys, self.values)
            )
            self.buffers = None
            return
        super().reorder_cache(beam_idx)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention: of one query per completion [R, heads, 1, D] to its prompt and
    itself; else its SDPA kernel.

    `attention_mask` is boolean [R, 1, 1, L] or None, `position_bias` [.., heads or 1, 1, L] is
    added to the scores.
    """
    if not isinstance(key, BranchKeys):
        options |= {"scaling": scaling, "position_bias": position_bias}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    prompt = key.prompt
    own = key.as_subclass(Tensor)
    rows, heads, _, width = query.shape
    queries = query.reshape(rows, own.shape[1], -1, width) * (
        width**-0.5 if scaling is None else scaling
    )
    scores = torch.cat(
        [
            prompt.single(prompt.grouped(queries) @ prompt.keys.transpose(2, 3)),
            (own @ queries.transpose(2, 3)).transpose(2, 3),
        ],
        -1,
    ).reshape(rows, heads, 1, -1)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores.masked_fill_(~attention_mask, -torch.inf)
    weights = scores.softmax(-1).reshape(rows, own.shape[1], heads // own.shape[1], -1)
    before, after = weights.split([prompt.keys.shape[2], own.shape[2]], -1)
    mixed = prompt.single(prompt.grouped(before) @ prompt.values) + after @ value
    return mixed.reshape(rows, 1, heads, -1), None


AttentionInterface.register(KERNEL, attend)
AttentionMaskInterface.register(KERNEL, sdpa_mask)


def can_branch(model: nn.Module) -> bool:
    """Whether a transformers model takes `BranchKeys` while `branching`, and gains by it.

    Not in half precision, where the scores above would be rounded; the SDPA kernel keeps them in
    float32.
    """
    exact = model.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    wide = model.config.get_text_config().hidden_size >= NARROW
    on_cpu = model.device.type == "cpu" and kernel_of(model.config) == "sdpa"
    return exact and wide and on_cpu and model._can_set_attn_implementation()


@contextmanager
def branching(model: nn.Module) -> Iterator[None]:
    """Inside, the model attends by the kernel above."""
    usual = model.config._attn_implementation
    model.config._attn_implementation = KERNEL
    try:
        yield
    finally:
        model.config._attn_implementation = usual
