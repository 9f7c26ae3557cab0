"""AOT: the sorted coupling is the best of all couplings, one pair is DPO, pairing does not matter
for the unpaired form.
"""

from itertools import permutations

import pytest
import torch

from alignkit.errors import ConfigError
from alignkit.losses import aot_loss, dpo_loss

F64 = torch.float64


def logps(n, seed=0):
    return -5 * torch.rand(4, n, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_a_batch_of_one_pair_is_dpo():
    pair = logps(1)
    for form in ("paired", "unpaired"):
        torch.testing.assert_close(
            aot_loss(*pair, beta=0.7, form=form), dpo_loss(*pair, beta=0.7), atol=1e-15, rtol=0
        )


def test_sorting_is_the_optimal_transport():
    """Of all couplings of the two samples the sorted one has the least mean logistic loss, as one
    dimension and convexity say.
    """
    pc, pr, rc, rr = logps(5)
    for form, high, low in (("unpaired", pc - rc, pr - rr), ("paired", pc - pr, rc - rr)):
        costs = [
            -(0.7 * (high - low[list(order)])).sigmoid().log().mean()
            for order in permutations(range(5))
        ]
        found = aot_loss(pc, pr, rc, rr, beta=0.7, form=form).mean()
        assert found.item() == pytest.approx(min(costs).item(), abs=1e-14)
        assert max(costs) - min(costs) > 0.01


def test_unpaired_ignores_who_was_paired_with_whom():
    pc, pr, rc, rr = logps(6)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    mixed = aot_loss(pc, pr[order], rc, rr[order], beta=0.7, form="unpaired")
    torch.testing.assert_close(
        mixed, aot_loss(pc, pr, rc, rr, beta=0.7, form="unpaired"), atol=1e-15, rtol=0
    )
    assert (
        aot_loss(pc, pr[order], rc, rr[order], beta=0.7) - aot_loss(pc, pr, rc, rr, beta=0.7)
    ).abs().max() > 1e-3


def test_the_gradient_goes_to_the_row_it_came_from():
    pc, pr, rc, rr = logps(3)
    high = torch.tensor([3.0, -1.0, 1.0], dtype=F64, requires_grad=True)  # ranks 2, 0, 1
    loss = aot_loss(high, torch.zeros(3, dtype=F64), rc, rr, beta=0.7)
    low = (rc - rr).sort().values
    (grad,) = torch.autograd.grad(loss[0], high)
    assert grad.tolist() == pytest.approx(
        [0.0, -0.7 * (-0.7 * (-1.0 - low[0])).sigmoid().item(), 0.0], abs=1e-15
    )
    with pytest.raises(ConfigError, match="'paired' or 'unpaired'"):
        aot_loss(pc, pr, rc, rr, beta=0.7, form="sorted")
