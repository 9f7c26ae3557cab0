"""Fusion of next-token laws: by hand, at its limits, and with impossible tokens."""

import pytest
import torch

from alignkit.decoding import fuse
from alignkit.errors import ConfigError, NumericsError, ShapeError


def laws(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).log_softmax(-1)


def test_the_product_of_powers_normalised():
    one = torch.tensor([0.5, 0.25, 0.25]).log()
    two = torch.tensor([0.2, 0.2, 0.6]).log()
    fused = fuse({"one": one, "two": two}, {"one": 2.0, "two": -1.0})
    products = torch.tensor([0.25 / 0.2, 0.0625 / 0.2, 0.0625 / 0.6])
    torch.testing.assert_close(fused.exp(), products / products.sum())


def test_weights_are_not_divided_by_their_sum():
    base = laws(4, 7)
    torch.testing.assert_close(fuse({"m": base}, {"m": 2.0}), (2 * base).log_softmax(-1))


def test_dera_has_its_ends():
    models = {"reference": laws(3, 5, seed=1), "aligned": laws(3, 5, seed=2)}
    torch.testing.assert_close(
        fuse(models, {"reference": 1.0, "aligned": 0.0}), models["reference"]
    )
    torch.testing.assert_close(fuse(models, {"reference": 0.0, "aligned": 1.0}), models["aligned"])


def test_impossible_tokens():
    never = torch.tensor([0.5, 0.5, 0.0]).log()
    full = torch.tensor([0.2, 0.3, 0.5]).log()
    assert fuse({"a": never, "b": full}, {"a": 0.5, "b": 1.0})[2] == -torch.inf
    torch.testing.assert_close(fuse({"a": never, "b": full}, {"a": 0.0, "b": 1.0}), full)

    both = fuse({"a": never, "b": never}, {"a": 1.0, "b": -0.5})
    torch.testing.assert_close(both.exp(), torch.tensor([0.5, 0.5, 0.0]))
    with pytest.raises(NumericsError, match="infinite"):
        fuse({"a": full, "b": never}, {"a": 1.0, "b": -0.5})
    left = torch.tensor([1.0, 0.0]).log()
    with pytest.raises(NumericsError, match="no token in common"):
        fuse({"a": left, "b": left.flip(0)}, {"a": 1.0, "b": 1.0})


def test_half_precision_is_computed_in_float32():
    models = {"a": laws(2, 9).bfloat16(), "b": laws(2, 9, seed=3).bfloat16()}
    fused = fuse(models, {"a": 1.0, "b": 0.3})
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused.exp().sum(-1), torch.ones(2))


def test_bad_arguments_are_refused():
    with pytest.raises(ConfigError, match="same names"):
        fuse({"a": laws(3)}, {"b": 1.0})
    with pytest.raises(ConfigError, match="every weight is 0"):
        fuse({"a": laws(3)}, {"a": 0.0})
    with pytest.raises(ConfigError, match="finite"):
        fuse({"a": laws(3)}, {"a": float("nan")})
    with pytest.raises(ShapeError):
        fuse({"a": laws(3), "b": laws(4)}, {"a": 1.0, "b": 1.0})
