"""Targets from constraints, on spaces that can be listed."""

import pytest
import torch

from alignkit import FDPG
from alignkit.decoding.moments import fit_moments
from alignkit.errors import ConfigError, NumericsError
from alignkit.policies.tabular import Tree


def world(seed=0):
    tree = Tree.build(4, 3)
    noise = torch.Generator().manual_seed(seed)
    theta = torch.randn(tree.states, tree.vocab, generator=noise, dtype=torch.float64)
    reference = tree.sequence_logps(theta)
    # How often token 0 is there, whether a response begins with token 1, and its length.
    features = torch.stack(
        [
            ((tree.tokens == 0) & tree.mask).sum(-1).double(),
            (tree.tokens[:, 0] == 1).double(),
            tree.mask.sum(-1).double(),
        ],
        -1,
    )
    return reference, features


def test_the_moments_are_those_asked_for_and_the_target_is_fdpgs_optimum():
    reference, features = world()
    wanted = torch.tensor([0.7, 0.5, 2.1], dtype=torch.float64)
    fit = fit_moments(features[None], wanted, reference[None])
    law = FDPG(beta=1.0).optimum(features @ fit.lambdas, reference).exp()
    torch.testing.assert_close(law @ features, wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(reference.exp() @ features, fit.before, rtol=0, atol=1e-12)
    torch.testing.assert_close(fit.moments, wanted, rtol=0, atol=1e-9)
    assert (wanted - fit.before).abs().min() > 0.05


def test_the_target_is_the_nearest_law_with_these_moments():
    """Any other law with the same means is further away: pushed along directions that keep them."""
    reference, features = world(1)
    fit = fit_moments(features[None, :, :2], torch.tensor([0.9, 0.4]), reference[None])
    law = (reference + features[:, :2] @ fit.lambdas).softmax(-1)
    kept = torch.cat([features[:, :2], torch.ones(len(law), 1).double()], -1)
    directions = torch.linalg.svd(kept.T).Vh[3:]
    nearest = (law * (law.log() - reference)).sum()
    for direction in directions[:5]:
        other = law + 0.5 * law.min() * direction / direction.abs().max()
        assert (other * (other.log() - reference)).sum() > nearest


def test_one_lambda_serves_all_prompts_and_a_pointless_constraint_costs_nothing():
    first, features = world(2)
    second, _ = world(3)
    both = torch.stack([first, second])
    wanted = torch.tensor([1.0])
    fit = fit_moments(features[None, :, :1].expand(2, -1, -1), wanted, both)
    laws = (both + features[:, :1] @ fit.lambdas).softmax(-1)
    assert abs(float((laws @ features[:, 0]).mean()) - 1) < 1e-9

    free = fit_moments(features[None], first.exp() @ features, first[None])
    assert free.lambdas.abs().max() < 1e-9


def test_means_that_cannot_be_had():
    reference, features = world()
    with pytest.raises(ConfigError, match=r"length: a mean of 3 is out of reach, .* less than 3;"):
        fit_moments(
            features[None], torch.tensor([1.0, 0.5, 3.0]), reference[None], ["a", "b", "length"]
        )
    # Beginning with token 1 always leaves at most two places for token 0.
    with pytest.raises(NumericsError, match="cannot be had together"):
        fit_moments(features[None, :, :2], torch.tensor([2.5, 0.9]), reference[None])
