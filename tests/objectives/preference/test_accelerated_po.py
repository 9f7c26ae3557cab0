"""Accelerated PO: exact iterations end at the closed form of the method; without momentum it is DPO
from the last copy.
"""

import pytest
import torch
from torch import Tensor

from alignkit import AcceleratedPO
from alignkit.batches import PairBatch, TokenLogps
from alignkit.losses import dpo_loss
from alignkit.oracles.optima import minimise
from alignkit.oracles.worlds import TabularWorld

F64 = torch.float64
N = 5


def iterate(objective: AcceleratedPO, reward: Tensor, target: Tensor, previous: Tensor) -> Tensor:
    """The minimiser [n] of the loss over all pairs of one-token responses with Bradley-Terry
    labels.
    """
    better, worse = torch.cartesian_prod(torch.arange(N), torch.arange(N)).T
    label = (reward[better] - reward[worse]).sigmoid()

    def loss(logits: Tensor) -> Tensor:
        def tokens(index: Tensor) -> TokenLogps:
            past = {"target": target[index, None], "previous": previous[index, None]}
            return TokenLogps(
                logits.log_softmax(-1)[index, None], past, torch.ones(N * N, 1, dtype=torch.bool)
            )

        (term,) = objective.loss(PairBatch(tokens(better), tokens(worse))).terms
        return (label * term.values).mean()

    return minimise(loss, target).log_softmax(-1)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_exact_iterations_end_at_the_closed_form(alpha):
    noise, beta = torch.Generator().manual_seed(0), 2.0
    reward = torch.randn(N, generator=noise, dtype=F64)
    reference = torch.randn(N, generator=noise, dtype=F64).log_softmax(-1)
    objective, previous, target = AcceleratedPO(beta=beta, alpha=alpha), reference, reference
    for t in range(1, 5):
        previous, target = target, iterate(objective, reward, target, previous)
        # sum of (1 - alpha^k) / (1 - alpha)
        gain = sum(sum(alpha**j for j in range(k)) for k in range(1, t + 1))
        torch.testing.assert_close(
            target, (reference + gain * reward / beta).log_softmax(-1), atol=1e-6, rtol=0
        )


def test_without_momentum_it_is_dpo_from_the_last_copy():
    objective = AcceleratedPO(beta=0.3, alpha=0.0)
    world = TabularWorld.build(objective.plan)
    batch = PairBatch.build(world.bundles, world.tokens())
    logps = [
        tokens.sequence(name)
        for name in ("policy", "target")
        for tokens in (batch.chosen, batch.rejected)
    ]
    found = objective.loss(batch)
    torch.testing.assert_close(found.terms[0].values, dpo_loss(*logps, beta=0.3), atol=0, rtol=0)
    margin = 0.3 * (logps[0] - logps[2] - logps[1] + logps[3])
    torch.testing.assert_close(found.metrics["rewards/margins"], margin)
