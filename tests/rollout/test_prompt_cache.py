"""Completions that share their prompt's keys and values, against every row with a cache of its own."""

import copy

import pytest
import torch
from small_models import FAMILIES, models_of, small_model
from torch import Tensor

from alignkit.batches import Draw
from alignkit.rollout.cache_probe import sampling_model
from alignkit.rollout.cached_model import CachedModel
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.kv_cache import RoomyLayer
from alignkit.rollout.prompt_cache import (
    KERNEL,
    BranchingLayer,
    BranchKeys,
    Prompts,
    _weighted,
    attend,
    branching,
    can_branch,
)

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 64,
    "head_dim": 64,
    "initializer_range": 0.08,
    "init_std": 0.08,
}


def layers(owner: list[int], seed: int = 0):
    """A branching and a plain layer after the same prefill of three prompts, the same selection of
    rows and two more tokens.
    """
    made = torch.Generator().manual_seed(seed)
    prefill = [torch.randn(3, 2, 5, width, generator=made) for width in (8, 6)]
    found = []
    for layer in (BranchingLayer(8), RoomyLayer(8)):
        layer.update(*prefill)
        layer.reorder_cache(torch.tensor(owner))
        found.append(layer)
    return *found, made


def step(shared, plain, made, rows: int, mask: torch.Tensor | None, **options):
    """Attention of one more token over both caches."""
    key, value = (torch.randn(rows, 2, 1, width, generator=made) for width in (8, 6))
    query = torch.randn(rows, 6, 1, 8, generator=made)  # three queries to a key
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    own = shared.update(key, value)
    assert isinstance(own[0], BranchKeys)
    assert own[0].shape[2] == plain.update(key, value)[0].shape[2] - 5
    assert shared.get_seq_length() == plain.get_seq_length()
    assert shared.get_mask_sizes(1) == plain.get_mask_sizes(1)
    keys, values = plain.keys, plain.values
    return attend(module, query, *own, mask, **options)[0], attend(
        module, query, keys, values, mask, **options
    )[0]


BIAS = torch.linspace(-2, 2, 42).view(1, 6, 1, 7)
OWNERS = {
    "in order": [0, 0, 1, 1, 2, 2],
    "uneven": [0, 1, 1, 1, 2],
    "mixed up": [2, 0, 1, 2, 0, 2],
    "by turns": [0, 1, 0, 1],
    "one unused": [0, 2, 2, 0],
}


@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"scaling": 0.7}, {"position_bias": torch.linspace(-2, 2, 42).view(1, 6, 1, 7)}],
    ids=list,
)
def test_attention_is_that_of_whole_rows(owner, options):
    shared, plain, made = layers(owner)
    rows = len(owner)
    for more in (1, 2):
        mask = torch.ones(rows, 1, 1, 5 + more, dtype=torch.bool)
        mask[torch.tensor(owner) == 1, :, :, :3] = False  # a prompt padded on the left
        given = {k: v[..., : 5 + more] if k == "position_bias" else v for k, v in options.items()}
        found, expected = step(shared, plain, made, rows, mask, **given)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    found, expected = step(shared, plain, made, rows, None)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_rows_that_leave_take_their_prompt_with_them():
    shared, plain, made = layers([0, 0, 1, 2, 2, 2])
    step(shared, plain, made, 6, None)
    kept = torch.tensor([5, 3, 1])
    for layer in (shared, plain):
        layer.reorder_cache(kept)
    torch.testing.assert_close(*step(shared, plain, made, 3, None), rtol=0, atol=2e-6)
    assert len(shared.prompt.keys) == 2  # no row is left of the second prompt
    for layer in (shared, plain):
        layer.reorder_cache(torch.tensor([0, 0]))
    torch.testing.assert_close(*step(shared, plain, made, 2, None), rtol=0, atol=2e-6)
    assert len(shared.prompt.keys) == 1


def test_grouping_goes_back():
    for owner in OWNERS.values():
        prompts = Prompts(torch.zeros(3, 2, 5, 8), torch.zeros(3, 2, 5, 8), torch.tensor(owner))
        figures = torch.arange(len(owner) * 2 * 3 * 4.0).view(len(owner), 2, 3, 4)
        assert torch.equal(prompts.single(prompts.grouped(figures)), figures)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_samples_and_log_probs_are_those_of_separate_rows(family, monkeypatch):
    """Families that do not branch (eager attention, windows, other caches) sample as they did."""
    settings = {"n_embd": 256, "word_embed_proj_dim": 256, **WIDE}
    model = small_model(family, vocab=11, seed=2, **settings)
    prompts = [torch.arange(1, 1 + size) for size in (2, 5, 7)]

    def drawn():
        sampler = HFSampler(models_of(model), max_new_tokens=9, seed=1)
        return [
            s
            for group in sampler.sample(prompts, Draw(4), step=0, prompt_ids=[0, 1, 2])
            for s in group
        ]

    used = []
    monkeypatch.setattr(
        Prompts, "grouped", lambda self, x, own=Prompts.grouped: used.append(1) or own(self, x)
    )
    found = drawn()
    assert bool(used) == (family in ("llama", "gemma3", "gpt2", "opt"))
    monkeypatch.setattr("alignkit.rollout.cached_model.can_branch", lambda _: False)
    used.clear()
    expected = drawn()
    assert not used
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.ids, other.ids)
        torch.testing.assert_close(one.logps, other.logps, rtol=0, atol=2e-5)


def test_a_model_that_branches_passes_the_probe_of_its_cache():
    model = small_model(**WIDE)
    assert can_branch(model)
    assert type(sampling_model(models_of(model), "policy", 1.0)) is CachedModel


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_branches_with_scores_in_float32(monkeypatch, autocast):
    """Beside the same tokens in float32, no further off than the kernel for a row at a time."""
    model = small_model(**WIDE)
    prompts = [torch.arange(size) % 3 + 1 for size in (9, 4)]
    half = model if autocast else copy.deepcopy(model).bfloat16()
    sampler = HFSampler(models_of(half), max_new_tokens=12, seed=1)

    def errors() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            drawn = sampler.sample(prompts, Draw(4), step=0, prompt_ids=[0, 1])
        parts = []
        for prompt, group in zip(prompts, drawn):
            for sample in group:
                whole = torch.cat([prompt, sample.ids])[None]
                logps = model(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                parts.append(sample.logps - logps.gather(-1, sample.ids[:, None])[:, 0])
        return torch.cat(parts)

    widths = []
    usual = Prompts.grouped
    monkeypatch.setattr(
        Prompts, "grouped", lambda self, x: widths.append(x.dtype) or usual(self, x)
    )
    with torch.no_grad():
        branching_errors = errors()
        assert set(widths) == {torch.float32}
        monkeypatch.setattr("alignkit.rollout.cached_model.can_branch", lambda _: False)
        row_errors = errors()
    assert branching_errors.square().mean() <= 1.5 * row_errors.square().mean()
    assert branching_errors.abs().max() < 0.05


def test_the_model_keeps_its_kernel():
    model = small_model(**WIDE)
    assert can_branch(model)
    assert not can_branch(small_model())  # narrow: nothing to gain
    assert can_branch(small_model(**WIDE).bfloat16())
    with branching(model):
        assert model.config._attn_implementation == KERNEL
    with pytest.raises(RuntimeError, match="stop"), branching(model):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", [BranchingLayer, RoomyLayer])
def test_a_cache_takes_no_room_for_tokens_that_cannot_come(kind):
    layer = kind(5 + 4)
    layer.update(torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 6))
    layer.reorder_cache(torch.tensor([0, 0, 1, 2, 2]))
    expected = layer.filled()
    for left in range(5, 1, -1):
        token = (torch.randn(left, 2, 1, 8), torch.randn(left, 2, 1, 6))
        seen = layer.update(*token)
        expected = [torch.cat(pair, 2) for pair in zip(expected, token)]
        assert all(map(torch.equal, expected, seen))
        room = 4 if kind is BranchingLayer else 9
        assert [buffer.shape[2] for buffer in layer.buffers] == [room, room]
        rows = torch.arange(left - 1)  # one row leaves
        layer.reorder_cache(rows)
        expected = [values[rows] for values in expected]


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("room", [0, 5])
def test_weighted_sums_of_values(group, room):
    """Whatever room the cache has behind the values, and where they are no cache's at all."""
    made = torch.Generator().manual_seed(0)
    values = torch.randn(4, 2, 7 + room, 8, generator=made)[..., :7, :]
    weights = torch.rand(4, 2, group, 7, generator=made)
    expected = torch.einsum("rhgt,rhtd->rhgd", weights.double(), values.double())
    found = _weighted(weights, values).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for part in (values.contiguous(), values.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(_weighted(weights, part).double(), found)
