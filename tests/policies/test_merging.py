"""Merged tensors against float64, and the tilt that a merge of tabular policies is exactly."""

import math

import pytest
import torch

from alignkit.errors import ConfigError, ShapeError
from alignkit.policies.merging import linear, slerp


def tensors(count, *shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(count)
    ]


def test_linear_is_its_formula():
    start, one, two = tensors(3, 3, 4)
    merged = linear(start, [one, two], [0.7, 0.6], share=0.5)
    torch.testing.assert_close(
        merged, start + 0.5 * (0.7 * (one - start) + 0.6 * (two - start)), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(linear(start, [one], [1.0], share=0.0), start, rtol=0, atol=0)


def test_slerp_begins_and_ends_at_the_models():
    start, one, two = tensors(3, 2, 5)
    torch.testing.assert_close(slerp(start, one, two, 0.0), one, rtol=0, atol=1e-14)
    torch.testing.assert_close(slerp(start, one, two, 1.0), two, rtol=0, atol=1e-14)


def test_slerp_of_orthogonal_equal_norms_keeps_the_norm():
    start = tensors(1, 4)[0]
    one = start + torch.tensor([3.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    two = start + torch.tensor([0.0, 0.0, 3.0, 0.0], dtype=torch.float64)
    for share in (0.25, 0.5, 0.8):
        assert float((slerp(start, one, two, share) - start).norm()) == pytest.approx(3.0)
    half = linear(start, [one, two], [0.5, 0.5], share=1.0)
    assert float((half - start).norm()) == pytest.approx(3 / math.sqrt(2))


def test_slerp_is_linear_where_there_is_no_angle():
    start, one = tensors(2, 6)
    longer = start + 2 * (one - start)
    expected = start + 1.25 * (one - start)
    torch.testing.assert_close(slerp(start, one, longer, 0.25), expected)
    torch.testing.assert_close(slerp(start, one, start, 0.25), start + 0.75 * (one - start))
    with pytest.raises(ConfigError, match="opposite"):
        slerp(start, one, start - (one - start), 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_tensors_are_merged_wider_and_rounded_once(dtype):
    start, one, two = tensors(3, 64, dtype=dtype)
    wide = [tensor.double() for tensor in (start, one, two)]
    step = torch.finfo(dtype).eps
    for merged, exact in (
        (slerp(start, one, two, 0.3), slerp(*wide, 0.3)),
        (linear(start, [one, two], [0.5, 0.5], 0.7), linear(wide[0], wide[1:], [0.5, 0.5], 0.7)),
    ):
        assert merged.dtype == dtype
        torch.testing.assert_close(
            merged.double(),
            exact,
            rtol=step,
            atol=4 * step if dtype == torch.float32 else step / 100,
        )


def test_the_merge_of_tabular_policies_is_the_tilt():
    """Logits ref + c r merged with share e are the tilted optimum at beta = 1 / (e c)."""
    reference, reward = tensors(2, 9)
    trained = reference + 4.0 * reward
    merged = linear(reference, [trained], [1.0], share=0.3)
    tilted = (reference + reward / (1 / (0.3 * 4.0))).log_softmax(0)
    torch.testing.assert_close(merged.log_softmax(0), tilted, rtol=0, atol=1e-13)


def test_buffers_have_to_be_equal():
    buffer = torch.arange(3)
    assert torch.equal(linear(buffer, [buffer], [1.0], 0.5), buffer)
    with pytest.raises(ConfigError, match="whole numbers"):
        slerp(buffer, buffer, buffer + 1, 0.5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError):
        slerp(torch.zeros(2), torch.zeros(3), torch.zeros(2), 0.5)
    with pytest.raises(ConfigError, match="one weight per model"):
        linear(torch.zeros(2), [torch.ones(2)], [0.5, 0.5], 1.0)
