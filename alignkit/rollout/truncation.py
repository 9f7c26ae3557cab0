"""What sampling leaves out of a next-token law, and the texts at which it stops."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignkit.errors import ConfigError
from alignkit.rollout.sparse import bregman_top_k


@dataclass(frozen=True)
class Truncation:
    """Which tokens of a law may be drawn, one rule after the other as in transformers."""

    top_k: int = 0  # only so many of the likeliest; 0 = all
    top_p: float = 1.0  # the smallest set with at least this mass (Holtzman et al. 2020)
    min_p: float = 0.0  # those at least so likely, relative to the likeliest (Nguyen et al. 2024)
    cost: float = 0.0  # of each token that is kept, in the units of `bregman_top_k`; 0 = all
    order: int = 1

    def __post_init__(self) -> None:
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ConfigError(
                f"sampling: top_k {self.top_k} (at least 0), top_p {self.top_p} (in (0, 1]), "
                f"min_p {self.min_p} (in [0, 1]): one of them is out of its range"
            )

    def __call__(self, logprobs: Tensor) -> Tensor:
        """Log-probs [R, V] of the law that is drawn from: renormalised, -inf outside."""
        if 0 < self.top_k < logprobs.shape[-1]:
            smallest = logprobs.topk(self.top_k, dim=-1).values[:, -1:]
            logprobs = _without(logprobs, logprobs < smallest)
        if self.top_p < 1:
            ordered, index = logprobs.sort(dim=-1, descending=True)
            mass_before = ordered.exp().cumsum(-1) - ordered.exp()
            outside = mass_before >= self.top_p
            logprobs = _without(logprobs, outside.scatter(-1, index, outside))
        if self.min_p > 0:
            likeliest = logprobs.max(-1, keepdim=True).values
            least = likeliest + torch.tensor(self.min_p, dtype=torch.float64).log().item()
            logprobs = _without(logprobs, logprobs < least)
        if self.cost > 0:
            logprobs = bregman_top_k(logprobs, self.cost, self.order)
        return logprobs


def _without(logprobs: Tensor, left_out: Tensor) -> Tensor:
    return logprobs.masked_fill(left_out, -torch.inf).log_softmax(-1)


class StopTexts:
    """Ends a completion with the token that completes one of `texts`."""

    def __init__(self, texts: Sequence[str], tokenizer: Any) -> None:
        for text in texts:
            _check_possible(text, tokenizer)
        self.texts = list(texts)
        self.tokenizer = tokenizer
        # Each token is at least a byte of a text, so that its end is within so many tokens.
        self.window = 2 + max((len(text.encode()) for text in texts), default=0)

    def reached(self, tokens: Tensor, position: int) -> Tensor:
        """Which rows' tokens [R, cap] have one of the texts in the end of what is drawn up to and
        with `position`: [R] bool.
        """
        if not self.texts:
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        ends = tokens[:, max(0, position + 1 - self.window) : position + 1].tolist()
        decoded = [self._text(ids) for ids in ends]
        ended = [any(text in end for text in self.texts) for end in decoded]
        return torch.tensor(ended, device=tokens.device)

    def _text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def _check_possible(text: str, tokenizer: Any) -> None:
    """ConfigError for a text that no tokens of the tokenizer decode to: sampling would never stop."""

    def comes_back(whole: str) -> bool:
        ids = tokenizer(whole, add_special_tokens=False).input_ids
        return text in tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    # Some tokenizers lose a space at the beginning, but not behind a word.
    word = tokenizer.decode([len(tokenizer) // 2])
    if not text or not (comes_back(text) or comes_back(word + text)):
        raise ConfigError(
            f"rollout.stop: the tokenizer cannot make {text!r}, so sampling would never stop there; "
            "give a text that it can write, such as one that it decodes itself"
        )
