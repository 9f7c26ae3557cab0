"""The noise is uniform, has no structure between its coordinates, and depends on nothing else."""

import pytest
import torch
from scipy import stats

from alignkit.rollout.noise import gumbel, row_keys, uniform

N = 20_000


def keys(seed=0, step=0, prompts=0, completions=0, positions=0):
    parts = torch.broadcast_tensors(
        *(
            torch.as_tensor(part)
            for part in (prompts, completions, positions, torch.zeros(1).long())
        )
    )
    return row_keys(seed, step, *(part.contiguous() for part in parts[:3]))


COORDINATES = {
    "seed": lambda: torch.cat([keys(seed=i) for i in range(2000)]),
    "step": lambda: torch.cat([keys(step=i) for i in range(2000)]),
    "prompt": lambda: keys(prompts=torch.arange(N)),
    "completion": lambda: keys(completions=torch.arange(N)),
    "position": lambda: keys(positions=torch.arange(N)),
}


@pytest.mark.parametrize("coordinate", COORDINATES)
def test_neighbours_along_every_coordinate_are_uniform_and_independent(coordinate):
    u = uniform(COORDINATES[coordinate](), 8)
    assert 0 < u.min() <= u.max() < 1
    assert stats.kstest(u.flatten().double().numpy(), "uniform").pvalue > 1e-4
    for first, second in (
        (u[:-1], u[1:]),
        (u[:, :-1], u[:, 1:]),
    ):  # neighbouring rows, neighbouring vocabulary indices
        cells = (first * 16).long() * 16 + (second * 16).long()
        assert stats.chisquare(torch.bincount(cells.flatten(), minlength=256).numpy()).pvalue > 1e-4


def test_a_large_vocabulary_has_no_serial_structure():
    u = uniform(keys(prompts=torch.arange(8)), 32_000).double()
    for lag in (1, 2, 16, 256, 1024, 16_000):
        z = ((u[:, :-lag] - 0.5) * (u[:, lag:] - 0.5)).sum() * 12 / (u[:, lag:].numel() ** 0.5)
        assert abs(z) < 4.5, lag
    rows = torch.corrcoef(u) - torch.eye(8, dtype=torch.float64)
    assert rows.abs().max() * 32_000**0.5 < 4.5


def test_small_uniforms_are_dense():
    """Tokens of probability 1e-8 win by tiny uniforms: a grid of 2^-24 would never sample them."""
    u = uniform(keys(prompts=torch.arange(400)), 32_000)
    small = u[u < 2.0**-20]
    assert len(small) > 5
    assert (small * 2.0**24 % 1 != 0.5).any()


def test_gumbel_moments():
    noise = gumbel(keys(prompts=torch.arange(200)), 1000).double()
    assert torch.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772156649) < 0.012  # 4 standard errors
    assert abs(noise.var() - torch.pi**2 / 6) < 0.035


def test_pure_function_of_its_coordinates():
    prompts, completions, positions = (
        torch.tensor([5, 9, 5, -1]),
        torch.tensor([0, 1, 1, 3]),
        torch.tensor([7, 7, 2, 2]),
    )
    together = gumbel(row_keys(3, 4, prompts, completions, positions), 50)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = gumbel(row_keys(3, 4, prompts[order], completions[order], positions[order]), 50)
    assert torch.equal(together[order], shuffled)
    one = gumbel(row_keys(3, 4, prompts[1:2], completions[1:2], positions[1:2]), 50)
    assert torch.equal(together[1:2], one)
    assert not torch.equal(together, gumbel(row_keys(4, 3, prompts, completions, positions), 50))
    assert not torch.equal(together, gumbel(row_keys(3, 4, completions, prompts, positions), 50))


def test_values_are_those_of_big_integer_arithmetic():
    """The stream is part of what makes a run repeatable; written out once more with Python's
    integers.
    """
    word, long = (1 << 32) - 1, (1 << 64) - 1

    def splitmix(x):
        x = (x + 0x9E3779B97F4A7C15) & long
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & long
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & long
        return x ^ (x >> 31)

    def finalise(x, between=0):
        x = ((x ^ (x >> 16)) * 0x7FEB352D + between) & word
        x = ((x ^ (x >> 15)) * 0x846CA68B) & word
        return x ^ (x >> 16)

    key = splitmix(7)
    for part in (1, 2, 3, 4):
        key = splitmix(key ^ part)
    expected = [
        (finalise(finalise(v) ^ (key & word), key >> 32) % 2**31 + 0.5) / 2**31 for v in range(300)
    ]
    found = uniform(keys(seed=7, step=1, prompts=2, completions=3, positions=4), 300)
    torch.testing.assert_close(
        found[0].double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0
    )


def test_negative_and_huge_numbers_are_taken():
    assert (
        len(
            torch.cat(
                [keys(seed=2**63 + 5), keys(seed=-1), keys(step=2**40), keys(prompts=-(2**62))]
            ).unique()
        )
        == 4
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_same_noise_on_the_gpu():
    here = keys(prompts=torch.arange(64))
    assert torch.equal(uniform(here.cuda(), 1000).cpu(), uniform(here, 1000))
