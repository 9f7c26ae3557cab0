"""HyPO: the sampled term follows the exact reverse KL; the samples are the policy's. Its limit,
DPO: the conformance suite.
"""

import pytest
import torch

from alignkit import HyPO
from alignkit.batches import PairBatch
from alignkit.losses import sampled_kl_loss
from alignkit.oracles.gradients import expected_gradient, gradient, sequence_kl
from alignkit.oracles.worlds import TabularWorld
from alignkit.policies.tabular import Tree

F64 = torch.float64


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_the_expected_gradient_is_the_reverse_kls(samples):
    tree = Tree.build(3, 2)
    theta, reference = torch.randn(
        2, tree.states, tree.vocab, dtype=F64, generator=torch.Generator().manual_seed(0)
    )
    n = len(tree.tokens)
    # every tuple of samples
    drawn = torch.cartesian_prod(*[torch.arange(n)] * samples).view(-1, samples)
    ref = tree.sequence_logps(reference)
    weights = tree.sequence_logps(theta)[drawn].sum(-1).exp()
    found = expected_gradient(
        lambda t: sampled_kl_loss(tree.sequence_logps(t)[drawn], ref[drawn]), theta, weights
    )
    torch.testing.assert_close(
        found, gradient(lambda t: sequence_kl(tree, t, reference), theta), atol=1e-12, rtol=0
    )


def test_the_samples_are_the_policys_and_held_out_pairs_need_none():
    objective = HyPO(samples=3)
    (draw,) = objective.plan.samples
    assert (draw.n, draw.source) == (3, "policy")
    world = TabularWorld.build(objective.plan)
    batch = PairBatch.build(world.bundles, world.tokens())
    assert len(batch.sampled.policy) == 3 * len(batch.chosen.policy)
    assert [term.name for term in objective.loss(batch).terms] == ["hypo", "kl"]
    assert [
        term.name for term in objective.loss(PairBatch(batch.chosen, batch.rejected)).terms
    ] == ["hypo"]
