"""SamPO: DPO for equal lengths, equally many tokens otherwise, a draw that is uniform and depends
on the tokens alone.
"""

from dataclasses import replace

import torch

from alignkit import DPO, SamPO
from alignkit.objectives.preference.sampo import drawn
from alignkit.oracles.worlds import TabularWorld, distance, solved

F64 = torch.float64


def test_equal_lengths_are_dpo():
    world = TabularWorld.build(SamPO().plan, seed=3)
    world = replace(world, mask=torch.ones_like(world.mask))
    plain = replace(world, plan=DPO().plan)
    assert distance(solved(SamPO(), world), solved(DPO(), plain)) < 1e-12


def test_as_many_tokens_of_the_long_response_as_the_short_one_has():
    world = TabularWorld.build(SamPO().plan)
    tokens = world.tokens()
    count = tokens.lengths.view(-1, 2).min(-1).values.repeat_interleave(2)
    kept = drawn(tokens.get("token_ids"), tokens.mask, count, seed=0)
    assert kept.sum(-1).tolist() == count.tolist()
    assert not (kept & ~tokens.mask).any()
    assert (kept != tokens.mask).any()


def test_every_subset_of_positions_is_equally_likely():
    """Two of five positions, one of them outside the mask: six subsets, 500 expected draws of each
    (5 standard deviations).
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(32000, (3000, 5), generator=generator)
    mask = torch.tensor([True, True, False, True, True]).expand_as(labels)
    kept = drawn(labels.to(F64), mask, torch.full((3000,), 2), seed=0)
    subsets, counts = kept.int().unique(dim=0, return_counts=True)
    assert len(subsets) == 6
    assert (counts - 500).abs().max() < 5 * (500 * 5 / 6) ** 0.5
    again = drawn(labels.to(F64), mask, torch.full((3000,), 2), seed=1)
    # another seed is another draw: 1/6 agree
    assert 0.1 < (kept == again).all(-1).double().mean() < 0.23


def test_the_mean_over_seeds_is_the_log_ratio_times_the_share_kept():
    world = TabularWorld.build(SamPO().plan)
    tokens = world.tokens()
    count = tokens.lengths.view(-1, 2).min(-1).values.repeat_interleave(2)
    draws = torch.stack(
        [drawn(tokens.get("token_ids"), tokens.mask, count, seed=s) for s in range(1000)]
    ).double()
    share = (count / tokens.lengths).unsqueeze(-1) * tokens.mask
    assert (draws.mean(0) - share).abs().max() < 5 * 0.5 / 1000**0.5
