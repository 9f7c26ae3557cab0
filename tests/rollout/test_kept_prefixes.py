"""Turns that go on from what was read before, against turns that read their episode anew."""

import pytest
import torch
from episode_worlds import Echo, loaded, player, prompts
from small_models import FAMILIES, STATEFUL, models_of, small_model
from world import save_model

from alignkit.batches import Draw
from alignkit.rollout import hf
from alignkit.rollout.cached_model import CachedModel
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.protocol import Continuation

GOES_ON = {"llama", "gpt2", "opt", "bloom"}  # all of whose layers attend to everything
WIDE = {"hidden_size": 256, "head_dim": 64, "n_embd": 256, "word_embed_proj_dim": 256}


@pytest.fixture
def tokens_read(monkeypatch):
    """How many tokens each prefill of a sampler reads, its padding included."""
    read = []
    prefill = CachedModel.prefill

    def counted(self, given, rooms, kept=()):
        logits = prefill(self, given, rooms, kept)
        read.append(self.mask.shape[1] - max((row[0][0].shape[1] for row in kept), default=0))
        return logits

    monkeypatch.setattr(CachedModel, "prefill", counted)
    return read


def two_turns(models, keep, **settings):
    """Three prompts, two episodes of each: a turn, a few foreign tokens (of other lengths), another
    turn.
    """
    sampler = HFSampler(models, max_new_tokens=12, seed=3, **settings)
    given = [torch.arange(1, 1 + size) for size in (2, 5, 7)]
    first = sampler.sample(given, Draw(2), step=1, prompt_ids=[0, 1, 2], keep=keep)
    going_on = [
        (row, completion, sample)
        for row, samples in enumerate(first)
        for completion, sample in enumerate(samples)
    ]
    contexts = [
        torch.cat([given[row], sample.ids, torch.arange(3, 4 + row)]) for row, _, sample in going_on
    ]
    second = sampler.sample(
        contexts,
        Draw(1),
        step=1,
        prompt_ids=[row for row, _, _ in going_on],
        continued=[
            Continuation(completion, len(sample.ids), 8, sample.cached)
            for _, completion, sample in going_on
        ],
        keep=keep,
    )
    return [sample for row in [*first, *second] for sample in row]


def check_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert one.ended == other.ended
        torch.testing.assert_close(one.logps, other.logps, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", [*sorted(FAMILIES), "mamba"])
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
def test_samples_are_those_of_turns_that_read_everything(family, wide):
    if wide and family in (*STATEFUL, "bloom"):
        pytest.skip("has no wide form in these tests")
    settings = {**WIDE, "initializer_range": 0.08, "init_std": 0.08} if wide else {}
    models = models_of(small_model(family, vocab=11, seed=2, **settings))
    kept, anew = (two_turns(models, keep) for keep in (True, False))
    check_same(kept, anew)
    assert any(sample.cached for sample in kept) == (family in GOES_ON)
    assert not any(sample.cached for sample in anew)


def test_a_model_that_goes_on_wrongly_reads_every_turn_anew(monkeypatch):
    models = models_of(small_model("llama", vocab=11, seed=2))
    anew = two_turns(models, keep=False)
    begin = hf.CachedModel.prefill

    def shifted(self, given, rooms, kept=()):
        kept = [[(keys + 0.1, values) for keys, values in row] for row in kept]
        return begin(self, given, rooms, kept)

    monkeypatch.setattr(CachedModel, "prefill", shifted)
    other = models_of(small_model("llama", vocab=11, seed=2))
    found = two_turns(other, keep=True)
    check_same(found, anew)
    assert not any(sample.cached for sample in found)


def test_no_more_tokens_are_kept_than_the_budget_says():
    models = models_of(small_model("llama", vocab=11, seed=2))
    whole = two_turns(models, keep=True)
    part = two_turns(models, keep=True, token_budget=20)
    check_same(part, whole)
    first_turns = part[:6]
    lengths = [len(sample.cached.ids) for sample in first_turns if sample.cached]
    assert 0 < sum(lengths) <= 20
    assert len(lengths) < sum(sample.ended for sample in first_turns)


def test_a_turn_reads_what_is_new(tmp_path, tokens_read):
    """And a measured sampler's second model as well."""
    models = loaded(save_model(tmp_path))
    for measured in (False, True):
        play = player(models, Echo)
        play.sampler.measured = measured
        play.episodes(prompts(3), Draw(4), step=5, prompt_ids=range(3))  # the probes of the cache
        tokens_read.clear()
        rows = play.episodes(prompts(3), Draw(4), step=5, prompt_ids=range(3))
        models_read = 1 + measured
        assert max(episode.turns for row in rows for episode in row) == 4
        assert (
            tokens_read == [2] * models_read + [3] * 3 * models_read
        )  # an end token and two words


def test_only_the_part_that_a_new_context_begins_with_is_used(monkeypatch):
    """A template that rewrites history changes tokens in the middle of what was read."""
    models = models_of(small_model("llama", vocab=11, seed=2))
    sampler = HFSampler(models, max_new_tokens=12, seed=3)
    (row,) = sampler.sample([torch.tensor([1, 2, 3])], Draw(4), step=1, prompt_ids=[0], keep=True)
    sample = next(sample for sample in row if sample.cached)
    for context in ([1, 2, 3], [1, 2, 4, 5, 6], [7], [1, 2, 3, *sample.ids.tolist()]):
        drawn = [
            sampler.sample(
                [torch.tensor(context)],
                Draw(1),
                step=1,
                prompt_ids=[0],
                continued=[Continuation(0, 4, 8, kept)],
            )[0]
            for kept in (sample.cached, None)
        ]
        check_same(*drawn)
