"""Rows by hand, and what holds for any bundles."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import bundle, random_bundles

from alignkit.policies.layout import (
    attention_mask,
    build_rows,
    computed_tokens,
    micro_batches,
    visible,
)


def test_shared_prefix_row_by_hand():
    """Two completions that begin alike (7), a hole in the first's mask, and nothing after its last
    trained token.
    """
    rows = build_rows(
        [bundle([5, 6], [[7, 8, 9, 10], [7, 11]], [[True, False, True, False], [True, True]])],
        "shared_prefix",
    )
    # the first completion needs inputs 7 8 (9 is a label only), the second 7: the tree is 5 6 7 8
    assert rows.input_ids.tolist() == [[5, 6, 7, 8]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3]]
    assert rows.ends.tolist() == [[4, 4, 4, 4]]
    assert not rows.branched, "one chain: plain causal attention"
    assert rows.labels.tolist() == [7, 9, 7, 11]
    assert rows.sources.tolist() == [1, 3, 1, 2]
    assert rows.targets.tolist() == [0, 2, 4, 5]
    assert rows.mask.tolist() == [[True, False, True, False], [True, True, False, False]]


def test_branches_do_not_see_each_other():
    rows = build_rows(
        [bundle([5, 6], [[9, 8, 3], [7, 4, 3]]), bundle([5], [[3], [4]])], "shared_prefix"
    )
    assert rows.branched
    assert rows.input_ids.tolist() == [[5, 6, 7, 4, 9, 8], [5, 0, 0, 0, 0, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 2, 3], [0] * 6]
    assert rows.ends.tolist() == [[6, 6, 4, 4, 6, 6], [1, 2, 3, 4, 5, 6]]
    assert visible(rows)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    assert torch.equal(visible(rows)[1, 0], torch.eye(6, dtype=torch.bool)), (
        "pads see themselves alone, nobody sees them"
    )
    # a window of two positions: the token itself and the one before it in its own branch
    assert visible(rows, 2)[0, 0].int().tolist()[4] == [0, 1, 0, 0, 1, 0]


def test_padded_rows_are_chains_and_need_no_mask():
    rows = build_rows([bundle([5, 6], [[7, 8], [9]])], "padded")
    assert rows.input_ids.tolist() == [[5, 6, 7], [5, 6, 0]]
    assert not rows.branched
    assert attention_mask(rows, {"": None}, additive=None).tolist() == [[1, 1, 1], [1, 1, 1]]


def test_masks_per_layer_type():
    rows = build_rows(random_bundles(0), "shared_prefix")
    masks = attention_mask(
        rows, {"full_attention": None, "sliding_attention": 3}, additive=torch.float32
    )
    assert set(masks) == {"full_attention", "sliding_attention"}
    assert torch.equal(masks["sliding_attention"] == 0, visible(rows, 3))
    assert torch.equal(attention_mask(rows, {"": 3}, additive=None), visible(rows, 3))


shapes = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.integers(1, 20), min_size=1, max_size=4)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 200), st.sampled_from(["shared_prefix", "padded"]))
def test_micro_batches_keep_every_bundle_within_the_budget(shape, budget, layout):
    bundles = [bundle([3] * p, [[4 + k] * t for k, t in enumerate(ts)]) for p, ts in shape]
    groups = micro_batches(bundles, budget, layout)
    assert sorted(i for group in groups for i in group) == list(range(len(bundles)))
    for group in groups:
        rows = build_rows([bundles[i] for i in group], layout)
        assert rows.input_ids.numel() <= budget or len(group) == 1
        assert rows.input_ids.shape[1] <= max(
            max(computed_tokens(bundles[i], layout)) for i in group
        )


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 9), st.sampled_from(["shared_prefix", "padded"]))
def test_every_trained_token_is_predicted_by_the_token_before_it(shape, seed, layout):
    """Following `ends` upwards from a source spells the prompt and the completion up to the label."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, 6, (n,), generator=rng).tolist()  # noqa: E731 - few tokens: many shared beginnings
    bundles = [
        bundle(draw(p), [draw(t) for t in ts], [[x != 3 for x in draw(t)] for t in ts])
        for p, ts in shape
    ]
    rows = build_rows(bundles, layout)
    seen = visible(rows)[:, 0]
    texts = [
        (b.prompt.tolist(), ids.tolist(), m)
        for b in bundles
        for ids, m in zip(b.completions, b.masks)
    ]
    found = 0
    for source, target, label in zip(
        rows.sources.tolist(), rows.targets.tolist(), rows.labels.tolist()
    ):
        (row, column), (n, t) = (
            divmod(source, rows.input_ids.shape[1]),
            divmod(target, rows.shape[1]),
        )
        prompt, ids, mask = texts[n]
        assert mask[t]
        assert label == ids[t]
        assert rows.input_ids[row][seen[row, column]].tolist() == prompt + ids[:t]
        assert rows.position_ids[row][seen[row, column]].tolist() == list(range(len(prompt) + t))
        found += 1
    assert found == sum(int(m.sum()) for _, _, m in texts)
