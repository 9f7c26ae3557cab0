"""SMC steering's resampling: exact expectations by integrating over its one random number."""

import pytest
import torch

from alignkit.decoding import steering_step
from alignkit.errors import ConfigError, NumericsError, ShapeError

GRID = (torch.arange(400, dtype=torch.float64) + 0.5) / 400


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_particle_twice_and_no_bias(keep, seed):
    generator = torch.Generator().manual_seed(seed)
    logs = 2 * torch.randn(7, generator=generator, dtype=torch.float64)
    logs[3] = -torch.inf
    mean = torch.zeros(7, dtype=torch.float64)
    largest = torch.zeros(7, dtype=torch.float64)  # new weights
    for uniform in GRID.tolist():
        places, weights = steering_step(logs, uniform, keep=keep)
        assert len(places) == keep == len(set(places.tolist()))
        mean[places] += weights.exp() / len(GRID)
        largest[places] = weights.exp()

    # The numbers that keep a particle are at most two intervals, cut by the grid at both ends.
    assert (mean - logs.exp()).abs().max() <= 4 * largest.max() / len(GRID)


def test_a_heavy_particle_stays_with_its_own_weight():
    logs = torch.tensor([10.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    for uniform in (0.0, 0.4, 0.99):
        places, weights = steering_step(logs, uniform, keep=2)
        assert places[0] == 0
        assert weights[0] == 10.0
        # One of three equals stands for all of them: 1 / c is the sum of their weights.
        assert weights[1] == pytest.approx(1 + torch.tensor(3.0).log().item())


def test_equal_weights_are_a_systematic_draw():
    logs = torch.zeros(6, dtype=torch.float64)
    places, weights = steering_step(logs, 0.5, keep=3)
    assert places.tolist() == [1, 3, 5]
    assert weights.tolist() == pytest.approx([torch.tensor(2.0).log().item()] * 3)


def test_few_living_particles_all_stay():
    logs = torch.tensor([-torch.inf, 0.3, -torch.inf, 0.7], dtype=torch.float64)
    places, weights = steering_step(logs, 0.2, keep=3)
    assert (places.tolist(), weights.tolist()) == ([1, 3], [0.3, 0.7])


def test_what_does_not_fit_is_refused():
    logs = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ConfigError, match="keep is 0"):
        steering_step(logs, 0.1, keep=0)
    with pytest.raises(ConfigError, match=r"uniform is 1\.0"):
        steering_step(logs, 1.0, keep=1)
    with pytest.raises(ShapeError):
        steering_step(logs[None], 0.1, keep=1)
    with pytest.raises(NumericsError, match="every particle has weight 0"):
        steering_step(logs - torch.inf, 0.1, keep=1)
