"""From sampled token ids to what people, rewards and judges read."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def decode(tokenizer: Any, ids: Tensor) -> str:
    """The text of token ids [T], without special tokens."""
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def decode_all(tokenizer: Any, completions: Sequence[Sequence[Tensor]]) -> list[list[str]]:
    """The texts of several completions [T] of each prompt."""
    return [[decode(tokenizer, ids) for ids in row] for row in completions]


def decode_after(tokenizer: Any, prompt: Tensor, ids: Tensor) -> str:
    """The text of `ids` as it follows `prompt`: both together are tokenised as they were drawn.

    Decoded alone, some tokenizers drop the space that a completion begins with.
    """
    before = decode(tokenizer, prompt)
    whole = decode(tokenizer, torch.cat([prompt, ids]))
    return whole[len(before) :]


def as_reply(prompt: Any, text: str) -> Any:
    """A completion in the form of its prompt, as rewards and judges read it: the assistant's
    message where the prompt is a chat (a list of messages), else the text itself.
    """
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
