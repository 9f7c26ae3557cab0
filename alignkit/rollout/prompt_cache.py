"""A prompt's keys and values once for all of its completions, while sampling on a CPU.

Attention to one new token per row is as slow as reading the cache. Completions of one prompt attend
to the same keys, so all their queries are multiplied with them at once and the keys are read once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from alignkit.policies.packing import NARROW, kernel_of
from alignkit.rollout.kv_cache import RoomyLayer

KERNEL = "alignkit_branches"  # the name under which transformers knows the attention below


class Prompts:
    """Keys and values [U, H, P, D] of U prompts, and the prompt of each of R completions (`owner`
    [R], into U). Prompts without a completion are dropped.

    Queries of one prompt are laid side by side, as many places for each prompt as the one with most
    completions needs.
    """

    def __init__(self, keys: Tensor, values: Tensor, owner: Tensor) -> None:
        owned, self.owner, counts = owner.unique(return_inverse=True, return_counts=True)
        all_owned = len(owned) == len(keys)
        self.keys = keys if all_owned else keys[owned]
        self.values = values if all_owned else values[owned]

        # Number the completions of each prompt: sorted by prompt, a completion's number is its
        # place less the place at which its prompt begins.
        self.places = int(counts.max())
        by_prompt = self.owner.argsort(stable=True)
        first = counts.cumsum(0) - counts  # [U]: where each prompt begins
        number = torch.empty_like(by_prompt)
        number[by_prompt] = (
            torch.arange(len(owner), device=owner.device) - first[self.owner[by_prompt]]
        )
        self.slots = self.owner * self.places + number  # [R] into U * places

        # Where the completions fill all places in their own order, nothing has to be moved.
        self.in_order = torch.equal(self.slots, torch.arange(len(owned) * self.places).to(owner))

    def taken(self, rows: Tensor) -> "Prompts":
        """The prompts of these completions."""
        return Prompts(self.keys, self.values, self.owner[rows])

    def grouped(self, per_completion: Tensor) -> Tensor:
        """[R, H, G, E] -> [U, H, places * G, E], 0 at places without a completion."""
        placed = per_completion
        if not self.in_order:
            shape = (len(self.keys) * self.places, *per_completion.shape[1:])
            placed = per_completion.new_zeros(shape)
            placed[self.slots] = per_completion
        return placed.unflatten(0, (-1, self.places)).transpose(1, 2).flatten(2, 3)

    def single(self, per_prompt: Tensor) -> Tensor:
        """The inverse of `grouped`: [U, H, places * G, E] -> [R, H, G, E]."""
        placed = per_prompt.unflatten(2, (self.places, -1)).transpose(1, 2).flatten(0, 1)
        return placed if self.in_order else placed[self.slots]


class BranchKeys(Tensor):
    """Keys [R, H, t, D] of the completions' own tokens; those of their prompts are in `prompt`.

    The model hands on whatever keys its cache returns, so this is how `attend` learns of prompts.
    """

    prompt: Prompts


class BranchingLayer(RoomyLayer):
    """A cache layer of prompts from which completions branch off. The first `reorder_cache` that
    takes more rows than there are prompts begins the branches; from then on `keys` and `values`
    hold the completions' own tokens.
    """

    prompt: Prompts | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `RoomyLayer`, in float32 at least; keys are `BranchKeys` once there are branches."""
        wide = torch.promote_types(key_states.dtype, torch.float32)
        keys, values = super().update(key_states.to(wide), value_states.to(wide), *args, **kwargs)
        if self.prompt is not None:
            keys = keys.as_subclass(BranchKeys)
            keys.prompt = self.prompt
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens that the next one sees, the prompt's included."""
        of_prompt = 0 if self.prompt is None else self.prompt.keys.shape[-2]
        return super().get_seq_length() + of_prompt

    def row(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values [H, L, D] of one completion, its prompt's included."""
        own = super().row(number)
        if self.prompt is None:
            return own
        owner = int(self.prompt.owner[number])
        of_prompt = (self.prompt.keys[owner], self.prompt.values[owner])
        return torch.cat([of_prompt[0], own[0]], 1), torch.cat([of_prompt[1], own[1]], 1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these rows, repeats allowed."""
        keys, values = self.filled()
        if self.prompt is None and len(beam_idx) > len(keys):
            # The branches begin: what is cached so far belongs to the prompts.
            self.prompt = Prompts(keys, values, beam_idx)
            self.most -= keys.shape[-2]
            self.keys = _without_tokens(keys, len(beam_idx))
            self.values = _without_tokens(values, len(beam_idx))
            self.buffers = None
            return

        if self.prompt is not None:
            self.prompt = self.prompt.taken(beam_idx)
        super().reorder_cache(beam_idx)


def _without_tokens(cached: Tensor, rows: int) -> Tensor:
    """[U, H, P, D] -> [rows, H, 0, D]."""
    _, heads, _, width = cached.shape
    return cached.new_empty(rows, heads, 0, width)


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
    """An attention kernel for transformers. With `BranchKeys`, the query of each completion
    [R, heads, 1, D] attends to its prompt and to the completion's own tokens; any other keys go to
    the SDPA kernel of transformers.

    `attention_mask` is boolean [R, 1, 1, L] or None, `position_bias` [.., heads or 1, 1, L] is
    added to the scores; L counts the prompt's tokens and the completion's. Scores and weights are
    in the keys' dtype, also where the queries are in half precision.
    """
    if not isinstance(key, BranchKeys):
        options |= {"scaling": scaling, "position_bias": position_bias}
        key, value = key.to(query.dtype), value.to(query.dtype)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    with torch.autocast(query.device.type, enabled=False):
        mixed = _attend_branches(
            query.to(key.dtype), key, value, attention_mask, scaling, position_bias
        )
    return mixed.to(query.dtype), None


def _attend_branches(
    query: Tensor,
    key: BranchKeys,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    position_bias: Tensor | None,
) -> Tensor:
    """What `attend` gives with `BranchKeys`, all in one dtype: [R, 1, heads, D]."""
    prompt = key.prompt
    own_keys = key.as_subclass(Tensor)
    rows, heads, _, width = query.shape
    key_heads = own_keys.shape[1]
    scale = width**-0.5 if scaling is None else scaling

    # Query heads that share a key head stand side by side, so that their keys are read once.
    queries = query.reshape(rows, key_heads, -1, width) * scale
    of_prompt = prompt.single(prompt.grouped(queries) @ prompt.keys.transpose(2, 3))
    of_own = (own_keys @ queries.transpose(2, 3)).transpose(2, 3)
    scores = torch.cat([of_prompt, of_own], -1).reshape(rows, heads, 1, -1)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        scores = scores.masked_fill_(~attention_mask, -torch.inf)

    weights = scores.softmax(-1).reshape(rows, key_heads, heads // key_heads, -1)
    on_prompt, on_own = weights.split([prompt.keys.shape[2], own_keys.shape[2]], -1)
    mixed = prompt.single(prompt.grouped(on_prompt) @ prompt.values) + _weighted(on_own, value)
    return mixed.reshape(rows, 1, heads, -1)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Sums of a cache layer's values [R, H, t, D], weighted by [R, H, G, t]: [R, H, G, D].

    A matrix product of few rows reads the values at half the memory's speed. A bag of an
    embedding's rows is the same sum at all of it: the embedding is the layer's whole buffer.
    """
    rows, heads, group, tokens = weights.shape
    width = values.shape[-1]
    room = values.stride(1) // width
    if values.stride() != (heads * room * width, room * width, width, 1):
        values, room = values.contiguous(), tokens  # a model has made something else of them
    everything = values.as_strided(((rows * heads - 1) * room + tokens, width), (width, 1))
    sums = functional.embedding_bag(
        _places(rows * heads, group, room, tokens),
        everything,
        per_sample_weights=weights.reshape(-1, tokens),
        mode="sum",
    )
    return sums.view(rows, heads, group, width)


@lru_cache(maxsize=1)
def _places(count: int, group: int, room: int, tokens: int) -> Tensor:
    """The first `tokens` rows of each of `count` buffers that stand end to end, each with `room`
    rows, `group` times: [count * group, tokens].
    """
    first = torch.arange(count).repeat_interleave(group) * room
    return first[:, None] + torch.arange(tokens)


AttentionInterface.register(KERNEL, attend)
AttentionMaskInterface.register(KERNEL, sdpa_mask)


def can_branch(model: Any) -> bool:
    """Whether a transformers model takes `BranchKeys` while `branching`, and gains by it."""
    wide = model.config.get_text_config().hidden_size >= NARROW
    on_cpu = model.device.type == "cpu" and kernel_of(model.config) == "sdpa"
    return bool(wide and on_cpu and model._can_set_attn_implementation())


@contextmanager
def branching(model: Any) -> Iterator[None]:
    """Inside, a transformers model attends by the kernel above."""
    usual = model.config._attn_implementation
    model.config._attn_implementation = KERNEL
    try:
        yield
    finally:
        model.config._attn_implementation = usual
