"""A learned value as a model: its "logits" after a prefix are log E e^(r / beta) of each next token.

Added to the logits of the model that it was learned from they give the guided law, and as log-twists
they steer particles; both need nothing else than what sampling does with any model.
"""

import torch
from torch import Tensor, nn

from alignkit.objectives.online.token_value import soft_value
from alignkit.policies.bins import BinHead

# Values [rows, V] computed at a time: the hidden layer has a hundred times as many numbers.
_VALUES_AT_A_TIME = 1 << 15


class ValueHead(nn.Module):
    """In the place of a language model's head: states [.., H] -> log E e^(r / beta) [.., V]."""

    def __init__(
        self, bins: BinHead, embedding: Tensor, *, low: float, high: float, beta: float
    ) -> None:
        super().__init__()
        self.bins = bins
        self.embedding = embedding  # [V, H]
        self.range = (low, high)
        self.beta = beta

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        flat = hidden.flatten(0, -2)
        rows = max(1, _VALUES_AT_A_TIME // len(self.embedding))
        parts = [self._values(part) for part in flat.split(rows)]
        return torch.cat(parts).unflatten(0, hidden.shape[:-1])

    def _values(self, hidden: Tensor) -> Tensor:
        laws = self.bins(hidden[:, None], self.embedding[None])  # [rows, V, B]
        low, high = self.range
        return soft_value(laws, low=low, high=high, beta=self.beta)
