"""Many samples of a small model at the price of its distinct prefixes."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Outcome = TypeVar("Outcome")


@torch.no_grad()
def sample_counts(
    model: nn.Module,
    prompt: Tensor,
    n: int,
    *,
    eos: int,
    cap: int,
    generator: np.random.Generator,
    temperature: float = 1.0,
) -> list[tuple[list[int], int]]:
    """`n` independent samples of one prompt [P] from the whole distribution, as (token ids with
    EOS, how often) pairs.

    Equal prefixes are one row of the forward pass: their n' samples split over the vocabulary by
    one multinomial draw. A sample without an end after `cap` tokens is cut there.
    """
    prefixes = prompt[None]
    counts = np.array([n])
    finished: list[tuple[list[int], int]] = []
    for length in range(1, cap + 1):
        logits = model(input_ids=prefixes, use_cache=False).logits[:, -1]  # [R, V]
        probabilities = (logits.double() / temperature).softmax(-1).numpy()

        # [R, V]: how many samples of each prefix go on with each token
        drawn = generator.multinomial(counts, probabilities)
        parents, tokens = drawn.nonzero()
        counts = drawn[parents, tokens]
        prefixes = torch.cat([prefixes[parents], torch.from_numpy(tokens)[:, None]], dim=1)

        ended = (tokens == eos) | (length == cap)
        finished += [
            (row[len(prompt) :].tolist(), int(count))
            for row, count in zip(prefixes[ended], counts[ended])
        ]
        prefixes = prefixes[~ended]
        counts = counts[~ended]
        if not len(counts):
            break
    return finished


def shuffled(
    counts: Sequence[tuple[Outcome, int]], generator: np.random.Generator
) -> list[Outcome]:
    """The samples one by one in random order: exchangeable, so
    that any two of them are independent draws.
    """
    samples = [outcome for outcome, count in counts for _ in range(count)]
    return [samples[i] for i in generator.permutation(len(samples))]
