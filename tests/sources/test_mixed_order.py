"""A mixture's order: shares hold over every epoch to one row, it follows from the seed and the
position alone, and no row of a source comes again before all others of it came.
"""

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_dataset import bundle

from alignkit.batches import Plan
from alignkit.config.row_sources import rows_by_share
from alignkit.sources.dataset import DatasetSource, MixedOrder

SHARES = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


@given(shares=SHARES, total=st.integers(0, 200))
def test_an_epoch_is_divided_to_less_than_one_row(shares, total):
    counts = rows_by_share(shares, total)
    assert sum(counts) == total
    for share, count in zip(shares, counts):
        exact = Fraction(share) * total / sum(map(Fraction, shares))
        assert abs(count - exact) < 1


@pytest.mark.parametrize(
    ("shares", "total", "counts"),
    [
        ([1, 1], 10, [5, 5]),
        ([3, 1], 10, [8, 2]),  # 7.5 and 2.5: the first of equals is rounded up
        ([1, 1, 1], 10, [4, 3, 3]),
        ([0.7, 0.3], 1000, [700, 300]),
        ([1e308, 1e308], 4, [2, 2]),  # no sum of floats is formed
    ],
)
def test_shares_by_hand(shares, total, counts):
    assert rows_by_share(shares, total) == counts


@st.composite
def mixtures(draw):
    """Sizes of some sources, and rows of each in an epoch."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=4))
    counts = draw(st.lists(st.integers(1, 12), min_size=len(sizes), max_size=len(sizes)))
    return sizes, counts


@given(mixture=mixtures(), seed=st.integers(0, 5), step=st.integers(1, 7))
def test_every_epoch_has_the_counts_and_any_window_the_same_items(mixture, seed, step):
    sizes, counts = mixture
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    order = MixedOrder(sizes, counts, seed)
    n = sum(counts)
    items = [i for first in range(0, 4 * n, step) for i in order[first : first + step]][: 4 * n]

    for epoch in range(4):
        visited = items[epoch * n : (epoch + 1) * n]
        assert [
            sum(start <= i < start + size for i in visited) for start, size in zip(starts, sizes)
        ] == counts

    # Among the visits of a source, each of its items comes once before one comes again.
    for start, size in zip(starts, sizes):
        visits = Counter(i for i in items if start <= i < start + size)
        times = [visits[i] for i in range(start, start + size)]
        assert max(times) - min(times) <= 1

    # It has no state: a resumed run asks for the middle first.
    assert MixedOrder(sizes, counts, seed)[2 * n + 1 : 3 * n] == items[2 * n + 1 : 3 * n]


def test_the_order_is_another_one_for_another_seed_and_mixes_the_sources():
    first, second = (MixedOrder([50, 50], [50, 50], seed)[0:100] for seed in (0, 1))
    assert first != second
    changes = sum((a < 50) != (b < 50) for a, b in pairwise(first))
    assert 30 < changes < 70  # 50 expected of a random order, 1 of one source after the other


@given(world=st.sampled_from([1, 2, 3]), step=st.integers(0, 20))
def test_ranks_partition_the_batch_of_one_process(world, step):
    data = [bundle(i) for i in range(7)]

    def source(rank, world):
        order = MixedOrder([3, 4], [5, 2], seed=1)
        return DatasetSource(
            data, Plan("pair"), 6, seed=1, rank=rank, world=world, order=order
        ).collect(step)

    whole = [b.uid for b in source(0, 1)]
    for rank in range(world):
        assert [b.uid for b in source(rank, world)] == whole[rank::world]
