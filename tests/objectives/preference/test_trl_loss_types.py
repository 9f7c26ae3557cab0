"""TRL's further loss types for pairs: equal to TRL 1.16's formulas, in value and gradient."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from alignkit.errors import ConfigError, ShapeError
from alignkit.losses import (
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    discopop_loss,
    exo_loss,
    nca_loss,
    sigmoid_norm_loss,
    sppo_hard_loss,
)

BETA = 0.3
LENGTHS = (torch.tensor([3, 1, 7, 2]), torch.tensor([2, 5, 1, 4]))


def four(seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = -5 * torch.rand(4, 4, generator=generator, dtype=torch.float64)
    return [v.requires_grad_() for v in values[:2]] + list(values[2:])


def scores(pc, pr, rc, rr):
    return pc - rc, pr - rr


def exo(chosen, rejected):
    x = BETA * (chosen - rejected)
    wins = x.sigmoid() * (logsigmoid(x) - torch.tensor(1 - 1e-3, dtype=x.dtype).log())
    return wins + (-x).sigmoid() * (logsigmoid(-x) - torch.tensor(1e-3, dtype=x.dtype).log())


def discopop(chosen, rejected):
    x = BETA * (chosen - rejected)
    share = (x / 0.05).sigmoid()
    return -logsigmoid(x) * (1 - share) + torch.exp(-x) * share


# name -> (loss, the formula of log-ratios)
CASES = {
    "apo_zero": (
        apo_zero_loss,
        lambda c, r: 1 - (BETA * c).sigmoid() + (BETA * r).sigmoid(),
    ),
    "apo_down": (
        apo_down_loss,
        lambda c, r: (BETA * c).sigmoid() + 1 - (BETA * (c - r)).sigmoid(),
    ),
    "exo_pair": (exo_loss, exo),
    "nca_pair": (
        nca_loss,
        lambda c, r: (
            -logsigmoid(BETA * c) - 0.5 * logsigmoid(-BETA * c) - 0.5 * logsigmoid(-BETA * r)
        ),
    ),
    "bco_pair": (bco_loss, lambda c, r: -logsigmoid(BETA * c) - logsigmoid(-BETA * r)),
    "discopop": (discopop_loss, discopop),
    "sppo_hard": (
        sppo_hard_loss,
        lambda c, r: (c - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name):
    loss, formula = CASES[name]
    logps = four()
    ours = loss(*logps, beta=BETA)
    theirs = formula(*scores(*logps))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(ours.sum(), logps[:2])
    expected = torch.autograd.grad(theirs.sum(), logps[:2])
    torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-12)
    with pytest.raises(ShapeError):
        loss(logps[0], logps[1][:2], *logps[2:], beta=BETA)


def test_sigmoid_norm_divides_by_lengths():
    logps = four()
    chosen, rejected = scores(*logps)
    margin = chosen / LENGTHS[0] - rejected / LENGTHS[1]
    loss = sigmoid_norm_loss(*logps, *LENGTHS, beta=BETA)
    torch.testing.assert_close(loss, -logsigmoid(BETA * margin), rtol=0, atol=1e-14)
    empty = sigmoid_norm_loss(*logps, 0 * LENGTHS[0], 0 * LENGTHS[1], beta=BETA)
    assert bool(empty.isfinite().all())


def test_discopop_stays_finite_where_its_parts_do_not():
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    zero = torch.zeros(2)
    loss = discopop_loss(far, zero, zero, zero, beta=1.0)
    gradient = torch.autograd.grad(loss.sum(), far)[0]
    torch.testing.assert_close(loss.detach(), torch.tensor([1e4, 0.0]))
    torch.testing.assert_close(gradient, torch.tensor([-1.0, 0.0]))


def test_what_has_no_meaning_is_refused():
    logps = four()
    with pytest.raises(ConfigError, match="label_smoothing"):
        exo_loss(*logps, beta=BETA, label_smoothing=0.0)
    with pytest.raises(ConfigError, match="discopop_tau"):
        discopop_loss(*logps, beta=BETA, discopop_tau=0.0)
