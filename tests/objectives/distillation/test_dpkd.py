"""DPKD: numbers by hand; its likelihood term is that of sft. The sum form's optimum and limit
(DPO): the conformance suite.
"""

import pytest
import torch
from torch.nn.functional import logsigmoid

from alignkit import DPKD, SFT
from alignkit.batches import PairBatch
from alignkit.losses import dpkd_loss
from alignkit.oracles.worlds import TabularWorld

F64 = torch.float64


def test_by_hand():
    pair = (torch.tensor([v], dtype=F64) for v in (-2.0, -3.0, -2.5, -2.75))
    lengths = (torch.tensor([2]), torch.tensor([4]))
    wanted = -logsigmoid(torch.tensor(2.0 * (0.5 / 2 + 0.25 / 4), dtype=F64)).item()
    assert dpkd_loss(*pair, *lengths, beta=2.0).item() == pytest.approx(wanted, abs=1e-15)


def test_the_likelihood_term_is_sft_on_the_teachers_response():
    objective = DPKD(lm_weight=0.3)
    world = TabularWorld.build(objective.plan)
    batch = PairBatch.build(world.bundles, world.tokens())
    (lm,) = [term for term in objective.loss(batch).terms if term.name == "lm"]
    (sft,) = SFT().loss(batch).terms
    torch.testing.assert_close(lm.values, sft.values, atol=0, rtol=0)
    assert (lm.weight, lm.unit) == (0.3, "tokens")
