"""Fixed data: the order is a function of the seed alone, every row is seen once per epoch, ranks
share one global batch.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignkit.batches import Bundle, Plan
from alignkit.errors import DataError
from alignkit.sources.bundle_io import pack, unpack
from alignkit.sources.dataset import DatasetSource, Order, with_shifted


def bundle(i, k=2):
    ids = [torch.arange(1 + j + i % 3) for j in range(k)]
    return Bundle(torch.tensor([i, i + 1]), ids, [x >= 0 for x in ids], f"row:{i}")


@given(n=st.integers(1, 12), size=st.integers(1, 9), seed=st.integers(0, 5))
def test_every_epoch_visits_every_item_once(n, size, seed):
    order = Order(n, seed)
    seen = [i for start in range(0, 6 * n, size) for i in order[start : start + size]][: 5 * n]
    assert all(sorted(seen[e * n : (e + 1) * n]) == list(range(n)) for e in range(5))
    # no state: any window, in any order of asking
    assert Order(n, seed)[3 * n : 3 * n + size] == order[3 * n : 3 * n + size]


@given(world=st.sampled_from([1, 2, 3]), step=st.integers(0, 20))
def test_ranks_partition_the_batch_of_one_process(world, step):
    data = [bundle(i) for i in range(7)]
    parts = [
        DatasetSource(data, Plan("pair"), 6, seed=1, rank=r, world=world).collect(step)
        for r in range(world)
    ]
    whole = DatasetSource(data, Plan("pair"), 6, seed=1).collect(step)
    assert sorted(b.uid for part in parts for b in part) == sorted(b.uid for b in whole)


def test_shifted_pairs_hold_the_next_completion_and_no_cached_anchor():
    data = [
        Bundle(b.prompt, b.completions, b.masks, b.uid, tokens={"reference": b.completions})
        for b in map(bundle, range(3))
    ]
    shifted = with_shifted(data)
    assert [
        torch.equal(s.completions[0], data[(i + 1) % 3].completions[0])
        for i, s in enumerate(shifted)
    ] == [True] * 3
    assert all(
        s.mismatched and not s.tokens and torch.equal(s.prompt, b.prompt)
        for s, b in zip(shifted, data)
    )


def test_nothing_to_train_on_is_said():
    with pytest.raises(DataError, match="0 rows"):
        DatasetSource([], Plan("pair"), 4, seed=0)
    with pytest.raises(DataError, match="smaller than the number of processes"):
        DatasetSource([bundle(0)], Plan("pair"), 1, seed=0, world=2)


@given(
    sizes=st.lists(st.lists(st.integers(1, 4), min_size=2, max_size=2), min_size=0, max_size=4),
    data=st.data(),
)
def test_bundles_survive_the_buffer_bit_for_bit(sizes, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    bundles = []
    for i, lengths in enumerate(sizes):
        ids = [torch.randint(9, (n,), generator=generator) for n in lengths]
        extra = {"behavior": [torch.randn(n, generator=generator) for n in lengths]}
        rows = {
            "score": torch.randn(2, generator=generator),
            "table": torch.randn(2, 2, generator=generator),
        }
        bundles.append(Bundle(torch.arange(1 + i), ids, [x > 4 for x in ids], f"u{i}", rows, extra))
    back = unpack(*pack(bundles))
    assert len(back) == len(bundles)
    for a, b in zip(bundles, back):
        assert a.uid == b.uid
        assert torch.equal(a.prompt, b.prompt)
        for x, y in zip(
            [*a.completions, *a.masks, *a.tokens["behavior"]],
            [*b.completions, *b.masks, *b.tokens["behavior"]],
        ):
            assert torch.equal(x, y)
        assert all(torch.equal(a.rows[k], b.rows[k]) for k in a.rows)
