"""TYPO: its optimum runs from the preferences' to the reference, and is stationary in between."""

import pytest
import torch

from alignkit.losses import typo_loss
from alignkit.oracles.optima import minimise

F64 = torch.float64


def test_by_hand():
    loss = typo_loss(
        torch.tensor([-1.0], dtype=F64), torch.tensor([-3.0], dtype=F64), reference_weight=0.5
    )
    assert loss.item() == pytest.approx(0.1269280110429725 + 1.0, abs=1e-12)  # log(1 + e^-2)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1e5])
def test_the_optimum_interpolates_between_preferences_and_reference(weight):
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(5, dtype=F64, generator=generator).log_softmax(-1)
    reward = torch.randn(5, dtype=F64, generator=generator)
    p = (reward[:, None] - reward[None]).sigmoid()
    drawn = reference.exp().outer(reference.exp())
    i, j = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T

    def loss(theta):
        logps = theta.log_softmax(-1)
        return (
            drawn[i, j] * p[i, j] * 2 * typo_loss(logps[i], logps[j], reference_weight=weight)
        ).sum()

    logps = minimise(loss, torch.zeros(5, dtype=F64)).log_softmax(-1)
    # stationary: what the preferences pull each response up by is what the likelihood pulls it down
    # by
    pull = (2 * drawn * (p - (logps[:, None] - logps[None]).sigmoid())).sum(1) / (1 + weight)
    anchor = weight * (reference.exp() - logps.exp()) / (1 + weight)
    torch.testing.assert_close(pull + anchor, torch.zeros(5, dtype=F64), atol=1e-7, rtol=0)
    if weight == 0:
        torch.testing.assert_close(logps, reward.log_softmax(-1), atol=1e-6, rtol=0)
    if weight > 1:
        torch.testing.assert_close(logps, reference, atol=1e-4, rtol=0)
