"""Small tensor functions of the TRL adapters. Axes: N rows, T tokens, M masked tokens, V vocabulary."""

import torch
from torch import Tensor

CHUNK = 1024  # tokens whose entropies are computed at a time, to bound the memory


@torch.no_grad()
def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each row of `logits` [M, V], without gradient: [M]."""
    logprobs = (chunk.float().log_softmax(-1) for chunk in logits.split(CHUNK))
    return torch.cat([-(chunk.exp() * chunk).sum(-1) for chunk in logprobs])


@torch.no_grad()
def on_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the vocabulary of each row of `logits` [M, V], and 1 where its largest is the
    one of `labels` [M], else 0: [M] each, float32.
    """
    likeliest = logits.argmax(-1) == labels
    return logits.mean(-1, dtype=torch.float32), likeliest.float()


def placed(values: Tensor, mask: Tensor) -> Tensor:
    """The `values` [M] of the tokens of `mask` [N, T] at their places, 0 elsewhere: [N, T]."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def on_first_token(sums: Tensor, mask: Tensor) -> Tensor:
    """Values per token [N, T] that add up to the `sums` [N] of the rows: each sum stands on the
    row's first masked token.
    """
    first = (mask.cumsum(-1) == 1) & mask
    return torch.where(first, sums[:, None], sums.new_zeros(()))
