"""WPO: how pairs weigh, by hand and for every loss that can be weighed."""

from importlib import import_module

import pytest
import torch

from alignkit import DPO
from alignkit.batches import PairBatch
from alignkit.losses import dpo_loss, wpo_weights
from alignkit.objectives import OBJECTIVES, locate
from alignkit.objectives.preference.weighting import COLLISION, WeighablePairs, log_collision
from alignkit.oracles.worlds import TabularWorld
from alignkit.policies.reference import resolve_kind


def test_by_hand():
    """p = (1/2, 1/4, 1/4): two draws agree with probability 3/8."""
    law = torch.tensor([[0.5, 0.25, 0.25]]).double().log()
    collision = log_collision(law, None, torch.tensor([0]))
    assert collision.exp().tolist() == pytest.approx([3 / 8])
    logps = law[:, :1].expand(2, 2)
    mask = torch.tensor([[True, True], [True, False]])
    collisions = torch.stack([collision, collision]).expand(2, 2)
    assert wpo_weights(logps, collisions, mask).tolist() == pytest.approx([4 / 3, 4 / 3])


CLASSES = [getattr(import_module(module), cls) for module, cls, _ in map(locate, OBJECTIVES)]
WEIGHABLE = [cls for cls in CLASSES if issubclass(cls, WeighablePairs)]


@pytest.mark.parametrize("cls", WEIGHABLE, ids=lambda cls: cls.__name__)
def test_every_loss_is_multiplied_by_both_weights(cls):
    objective = cls(weighting="wpo")
    world = TabularWorld.build(objective.plan)
    tokens = world.tokens()
    batch = objective_batch(world, tokens)
    (weighed,) = objective.loss(batch).terms
    (plain,) = cls().loss(batch).terms
    weights = [
        wpo_weights(side.policy, side.extras[COLLISION], side.mask)
        for side in (batch.chosen, batch.rejected)
    ]
    torch.testing.assert_close(weighed.values, plain.values * weights[0] * weights[1])


def objective_batch(world, tokens):
    return PairBatch.build(world.bundles, tokens)


def test_the_weights_get_no_gradient():
    objective = DPO(weighting="wpo")
    world = TabularWorld.build(objective.plan)
    tokens = world.tokens().map(torch.Tensor.detach)
    tokens.policy.requires_grad_()
    batch = objective_batch(world, tokens)
    (term,) = objective.loss(batch).terms
    (slope,) = torch.autograd.grad(term.values.sum(), tokens.policy, retain_graph=True)
    weights = term.values.detach() / dpo_loss(*batch.sequence_logps(), beta=0.1).detach()
    expected = dpo_loss(*batch.sequence_logps(), beta=0.1) * weights
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), tokens.policy)[0])


def test_the_references_log_probs_may_still_be_stored():
    """The weights read the policy's laws alone."""
    plan = DPO(weighting="wpo").plan
    assert resolve_kind("auto", plan, adapter=False, fixed_data=True) == "cached"
