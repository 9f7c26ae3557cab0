"""D2O: numbers by hand, and DPO where the only own response is the chosen one."""

import math

import pytest
import torch

from alignkit import D2O, DPO
from alignkit.batches import PairBatch
from alignkit.errors import ShapeError
from alignkit.losses import d2o_loss
from alignkit.oracles.worlds import TabularWorld

F64 = torch.float64


def test_by_hand():
    own = torch.tensor([[1.0, 3.0]], dtype=F64)
    found = d2o_loss(own, torch.tensor([-2.0], dtype=F64), alpha=0.5, beta=0.25)
    assert found.item() == pytest.approx(math.log1p(math.exp(-(0.25 * 2 + 1.0))), abs=1e-15)
    with pytest.raises(ShapeError, match=r"rejected_log_ratios \[2\]"):
        d2o_loss(own, torch.zeros(2, dtype=F64), alpha=1, beta=1)


def test_with_the_chosen_as_the_one_own_response_it_is_dpo():
    world = TabularWorld.build(DPO().plan)
    batch = PairBatch.build(world.bundles, world.tokens())
    same = PairBatch(batch.chosen, batch.rejected, batch.chosen)
    (mine,) = D2O(alpha=0.3, beta=0.3, samples=1).loss(same).terms
    (dpo,) = DPO(beta=0.3).loss(batch).terms
    torch.testing.assert_close(mine.values, dpo.values, atol=1e-14, rtol=0)
