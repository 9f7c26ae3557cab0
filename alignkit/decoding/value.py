"""A learned value: log E e^(r / beta) of each next token, from the states of the model beside it.

Added to the logits of the model that it was learned from it gives the guided law, and as log-twist
it steers particles. Guidance needs it of all tokens, and takes it as a model whose "logits" it is;
particles are right with any twist, so that there the likeliest tokens are enough.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from alignkit.objectives.online.token_value import soft_value
from alignkit.policies.bins import BinHead

# Values computed at a time: the hidden layer has a hundred times as many numbers.
_VALUES_AT_A_TIME = 1 << 12


class ValueHead(nn.Module):
    """In the place of a language model's head: states [.., H] -> log E e^(r / beta) [.., V].

    The head's weights are read once, so it is for finished models.
    """

    def __init__(
        self, bins: BinHead, embedding: Tensor, *, low: float, high: float, beta: float
    ) -> None:
        super().__init__()
        self.bins = bins
        self.range = (low, high)
        self.beta = beta
        with torch.no_grad():
            self.tokens = bins.of_tokens(embedding)  # [V, W]

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        flat = hidden.flatten(0, -2)
        rows = max(1, _VALUES_AT_A_TIME // len(self.tokens))
        parts = [self._values(part, self.tokens[None]) for part in flat.split(rows)]
        return torch.cat(parts).unflatten(0, hidden.shape[:-1])

    def of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The values of some tokens alone: states [L, H], tokens [L, C] -> [L, C]."""
        rows = max(1, _VALUES_AT_A_TIME // tokens.shape[1])
        parts = zip(hidden.split(rows), tokens.split(rows), strict=True)
        return torch.cat([self._values(part, self.tokens[ids]) for part, ids in parts])

    def _values(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Values [L, C] of states [L, H] and the tokens' parts of the hidden layer, [L or 1, C, W]."""
        laws = self.bins.laws(self.bins.of_states(hidden)[:, None] + tokens)  # [L, C, B]
        low, high = self.range
        return soft_value(laws, low=low, high=high, beta=self.beta)


def twists_of_likeliest(logprobs: Tensor, values: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """Twists l of every next token where `values` is asked for the `count` likeliest of each row.

    logprobs [L, V]; `values` takes tokens [L, C] and gives l of each, [L, C]. All other tokens of a
    row share one guess: log of the mean of e^l over the likeliest, as likely as they are. Returns
    [L, V] in the dtype of the values; with a `count` of V or more they are those of all tokens.
    """
    rows, size = logprobs.shape
    if count >= size:
        return values(torch.arange(size, device=logprobs.device).expand(rows, -1))

    likeliest = logprobs.topk(count, sorted=False)
    known = values(likeliest.indices)
    shares = likeliest.values.to(known.dtype).log_softmax(-1)
    rest = torch.logsumexp(shares + known, dim=-1, keepdim=True)
    return rest.expand(rows, size).scatter(-1, likeliest.indices, known)
