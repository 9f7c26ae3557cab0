"""Sampling by distinct prefixes against the law it claims to sample from."""

from collections import Counter
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from alignkit.tasks.sampling import sample_counts, shuffled

EOS, VOCAB = 0, 3


class Markov(nn.Module):
    """Next-token logits that depend on the last two tokens."""

    def __init__(self):
        super().__init__()
        self.table = torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, VOCAB)
        logits[:, 1:] = self.table[input_ids[:, :-1], input_ids[:, 1:]]
        return SimpleNamespace(logits=logits)


def law(
    model: Markov, prompt: list[int], cap: int, temperature: float
) -> dict[tuple[int, ...], float]:
    """Probability of every outcome, by listing all of them."""
    found = {}
    for length in range(1, cap + 1):
        for ids in product(range(VOCAB), repeat=length):
            if EOS in ids[:-1] or (ids[-1] != EOS and length < cap):
                continue
            path, probability = list(prompt), 1.0
            for token in ids:
                probability *= float(
                    (model.table[path[-2], path[-1]].double() / temperature).softmax(-1)[token]
                )
                path.append(token)
            found[ids] = probability
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    return found


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_counts_follow_the_law_with_its_cap(temperature):
    model, prompt, n = Markov(), [1, 2], 20_000
    expected = law(model, prompt, 4, temperature)
    generator = np.random.default_rng(0)
    counts = sample_counts(
        model, torch.tensor(prompt), n, eos=EOS, cap=4, generator=generator, temperature=temperature
    )
    found = {tuple(ids): count for ids, count in counts}
    assert len(found) == len(counts)  # each outcome once
    assert sum(found.values()) == n
    assert set(found) <= set(expected)
    statistic = sum((found.get(ids, 0) - n * p) ** 2 / (n * p) for ids, p in expected.items())
    freedom = len(expected) - 1
    # chi squared: mean `freedom`, variance twice that
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


def test_the_same_seed_gives_the_same_samples_in_the_same_order():
    def draw(seed):
        generator = np.random.default_rng(seed)
        return shuffled(
            sample_counts(Markov(), torch.tensor([1, 1]), 50, eos=EOS, cap=4, generator=generator),
            generator,
        )

    assert draw(1) == draw(1) != draw(2)
    assert len(draw(1)) == 50


def test_shuffling_keeps_every_sample():
    order = shuffled([([1, 0], 3), ([2], 2)], np.random.default_rng(0))
    assert Counter(map(tuple, order)) == {(1, 0): 3, (2,): 2}
