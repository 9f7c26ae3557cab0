"""Stopping and switching rules against numbers made by hand, and selective contrast by its limits."""

from math import log

import pytest
import torch

from alignkit.decoding import (
    answers_needed,
    fuse,
    model_switch,
    selective_contrast,
    semantic_entropy,
)
from alignkit.errors import ConfigError


def test_the_entropy_of_meanings():
    assert semantic_entropy(["7"] * 5) == 0
    assert semantic_entropy(["7", "8", "9"]) == pytest.approx(log(3))
    assert semantic_entropy(["7", "7", "7", "9"]) == pytest.approx(0.75 * log(4 / 3) + log(4) / 4)
    assert semantic_entropy([None, None]) == pytest.approx(log(2))


def test_when_to_stop():
    answers = ["1", "2", "2", "2", "2", "2"]
    assert answers_needed(answers, least=2, threshold=0.0) == 6
    assert answers_needed(answers, least=2, threshold=0.57) == 4  # entropy of 1 of 4: 0.5623
    assert answers_needed(answers[1:], least=2, threshold=0.0) == 2
    with pytest.raises(ConfigError, match="2 or more"):
        answers_needed(answers, least=1, threshold=0.0)


def test_models_are_asked_until_one_agrees_with_itself():
    sure, unsure = ["7", "7", "7"], ["8", "9", "8"]
    assert model_switch({"a": sure, "b": unsure}).asked == ("a",)
    assert model_switch({"b": unsure, "a": sure}).asked == ("b", "a")
    assert model_switch({"b": unsure, "a": sure}).answer == "7"
    assert model_switch({"b": unsure, "a": sure}, agreement=0.6).answer == "8"

    # Nobody agrees: 8 has two votes of 1 - H(1/3) / log 3, and 9 one of them and none of a's.
    scattered = ["1", "9", "3"]
    assert model_switch({"b": unsure, "c": scattered}) == model_switch(
        {"b": unsure, "d": scattered}
    ).__class__("8", ("b", "c"))
    assert model_switch({"c": [None, None]}).answer is None
    with pytest.raises(ConfigError, match="every model needs answers"):
        model_switch({"a": []})


def test_contrast_only_where_the_model_is_unsure():
    noise = torch.Generator().manual_seed(0)
    own, worse = torch.randn(2, 4, 6, dtype=torch.float64, generator=noise).log_softmax(-1)
    close = {"atol": 1e-12, "rtol": 0}
    all_kept = {"plausible": 1e-9}

    never = selective_contrast(own, worse, strength=0.5, sure=0.0)
    torch.testing.assert_close(never, own, **close)
    for same in (
        selective_contrast(own, worse, strength=0.0, sure=1.0, **all_kept),
        selective_contrast(own, own, strength=0.7, sure=1.0, **all_kept),
    ):
        torch.testing.assert_close(same, own, **close)

    always = selective_contrast(own, worse, strength=0.5, sure=1.0, **all_kept)
    fused = fuse({"own": own, "worse": worse}, {"own": 1.5, "worse": -0.5})
    torch.testing.assert_close(always, fused, **close)

    bar = float(own.exp().max(-1).values.sort().values[1:3].mean())
    some = selective_contrast(own, worse, strength=0.5, sure=bar, **all_kept)
    unsure = own.exp().max(-1).values < bar
    torch.testing.assert_close(some[unsure], fused[unsure], **close)
    torch.testing.assert_close(some[~unsure], own[~unsure], **close)
    assert unsure.sum() == 2

    few = selective_contrast(own, worse, strength=0.5, sure=1.0, plausible=0.5).exp()
    assert torch.equal(few > 0, own.exp() >= 0.5 * own.exp().max(-1, keepdim=True).values)
