"""The KL of critical tokens: by hand at certain and uncertain references, and its whole gradient,
later tokens' cost included.
"""

import math

import pytest
import torch
from torch import Tensor

from alignkit import CriticalRPG
from alignkit.kl import exact
from alignkit.objectives.online.critical_rpg import critical_kl
from alignkit.oracles.gradients import Population, gradient, misalignment
from alignkit.tensors import masked_sum

F64 = torch.float64


def test_by_hand():
    reference = torch.tensor(
        [[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]], dtype=F64
    ).log()
    policy = torch.tensor(
        [[1.0, 0.0, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1], [0.9, 0.1, 0.0, 0.0]], dtype=F64
    ).log()
    found = critical_kl(policy, reference, torch.zeros(3, dtype=torch.int64), power=3.0)
    last = 0.5**3 * (0.9 * math.log(1.8) + 0.1 * math.log(0.2))  # half certain: one bit of two
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, last], dtype=F64), atol=1e-15, rtol=0)


@pytest.mark.parametrize("power", [0.5, 3.0])
def test_the_gradient_is_that_of_the_expected_weighted_kl(power):
    """E over the policy's responses of sum_t certainty^power KL_t, the law of the prefixes
    included.
    """
    population = Population.build()
    tree, reference = population.tree, population.tree.logprobs(population.reference)

    def value(theta: Tensor) -> Tensor:
        policy = tree.logprobs(theta)
        entropy = -(reference.exp() * reference).sum(-1)
        weights = (1 - entropy / math.log(tree.vocab)) ** power
        return (
            tree.sequence_logps(theta).exp()
            * masked_sum(weights * exact(policy, reference), tree.mask)
        ).sum()

    nothing = torch.zeros(len(tree.tokens), dtype=F64)
    found = population.delivered(CriticalRPG(power=power), nothing)
    assert misalignment(found, gradient(value, population.theta)) < 1e-12
    plain = population.delivered(CriticalRPG(power=0.0), nothing)
    assert misalignment(plain, gradient(value, population.theta)) > 1e-2
