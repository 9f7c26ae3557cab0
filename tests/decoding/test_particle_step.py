"""Resampling of particles: systematic, adaptive, unbiased, and never a dead one."""

import math

import pytest
import torch

from alignkit.decoding import particle_step
from alignkit.errors import ConfigError, NumericsError, ShapeError


def test_even_weights_go_on_as_they_are():
    weights = torch.tensor([0.1, 0.0, -0.1], dtype=torch.float64)
    same, ancestors, log_z = particle_step(weights, 0.3, ess=0.5)
    assert torch.equal(same, weights)
    assert ancestors.tolist() == [0, 1, 2]
    assert log_z == 0.0


def test_by_hand():
    """W = .7 .1 .2; with u = .5 the points are 1/6, 1/2, 5/6."""
    weights = torch.tensor([0.7, 0.1, 0.2], dtype=torch.float64).log() + 2.0
    fresh, ancestors, log_z = particle_step(weights, 0.5, ess=1.0)
    assert torch.equal(fresh, torch.zeros(3, dtype=torch.float64))
    assert ancestors.tolist() == [0, 0, 2]
    assert ancestors.dtype == torch.int64
    assert log_z == pytest.approx(2.0 - math.log(3), abs=1e-12)


def test_systematic_resampling_is_unbiased():
    """The mean number of copies over the uniform is N W."""
    weights = torch.tensor([0.3, -2.0, 1.1, 0.0, -0.5], dtype=torch.float64)
    copies = torch.zeros(5, dtype=torch.float64)
    uniforms = (torch.arange(2_000, dtype=torch.float64) + 0.5) / 2_000
    for uniform in uniforms.tolist():
        copies += torch.bincount(particle_step(weights, uniform, ess=1.0)[1], minlength=5)
    torch.testing.assert_close(copies / 2_000, 5 * weights.softmax(0), rtol=0, atol=2e-3)


@pytest.mark.parametrize("uniform", [0.0, 0.4, 1 - 1e-12])
def test_a_dead_particle_is_never_taken(uniform):
    dead = -torch.inf
    weights = torch.tensor([dead, 0.0, dead, 1e-3, dead], dtype=torch.float64)
    _, ancestors, _ = particle_step(weights, uniform, ess=1.0)
    assert set(ancestors.tolist()) == {1, 3}


def test_what_cannot_go_on_is_refused():
    dead = torch.full((4,), -torch.inf, dtype=torch.float64)
    with pytest.raises(NumericsError, match="every particle"):
        particle_step(dead, 0.5, ess=0.5)
    with pytest.raises(NumericsError, match="not a number"):
        particle_step(torch.tensor([0.0, float("nan")]), 0.5, ess=0.5)
    with pytest.raises(ConfigError, match="uniform"):
        particle_step(torch.zeros(2), 1.0, ess=0.5)
    with pytest.raises(ConfigError, match="ess"):
        particle_step(torch.zeros(2), 0.0, ess=1.5)
    with pytest.raises(ShapeError):
        particle_step(torch.zeros(2, 2), 0.0, ess=0.5)
