"""LD-DPO: numbers by hand, holes in masks, truncation at alpha = 0. The limit alpha = 1, DPO: the
conformance suite.
"""

from dataclasses import replace

import pytest
import torch

from alignkit import DPO, LDDPO
from alignkit.objectives.preference.lddpo import length_desensitised
from alignkit.oracles.worlds import TabularWorld, distance, solved


def test_by_hand():
    logps = torch.tensor([[-1.0, -9.0, -2.0, -4.0]])
    # the second shared token stands at the third position
    mask = torch.tensor([[True, False, True, True]])
    for alpha, wanted in ((0.5, -5.0), (0.0, -3.0), (1.0, -7.0)):
        found = length_desensitised(logps, mask, torch.tensor([2]), alpha=alpha)
        assert found.tolist() == pytest.approx([wanted], abs=1e-6)


def test_alpha_0_is_dpo_on_truncated_responses():
    world = TabularWorld.build(DPO().plan, seed=5)
    lengths = world.mask.sum(-1).view(-1, 2).min(-1).values.repeat_interleave(2)
    short = replace(world, mask=world.mask & (world.mask.cumsum(-1) <= lengths[:, None]))
    assert (short.mask != world.mask).any()
    assert distance(solved(LDDPO(alpha=0.0), world), solved(DPO(), short)) < 1e-12
