"""The trial before the first sample: state-space models, caches that are ignored, models that cannot
be sampled from.
"""

import functools
import logging
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_models import STATEFUL, models_of, small_model
from world import run, write_rows

from alignkit.batches import Draw
from alignkit.errors import ModelError
from alignkit.files import read_jsonl
from alignkit.rollout import HFSampler
from alignkit.rollout.cache_probe import sampling_model
from alignkit.rollout.cached_model import CachedModel, UncachedModel
from alignkit.rollout.generate import OneModel

PROMPTS = [torch.tensor(ids) for ids in ([4, 5], [3, 7, 9, 3, 8, 11, 2], [2, 2, 3, 5], [6])]
CASE = Path(__file__).resolve().parents[3] / "shared" / "cases" / "mamba" / "model"


@torch.no_grad()
def whole_row(model, prompt, ids):
    """Log-probs of `ids` after `prompt` from one forward over the row: [T]."""
    row = torch.cat([prompt, ids])[None]
    logps = model(row, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(-1, ids[:, None])[:, 0]


def check_samples(model):
    """Every sample's recorded log-probs are those of a whole row; prompts of different lengths."""
    drawn = HFSampler(models_of(model), max_new_tokens=9).sample(
        PROMPTS, Draw(3), step=0, prompt_ids=range(4)
    )
    longest = 0
    for prompt, samples in zip(PROMPTS, drawn, strict=True):
        for sample in samples:
            expected = whole_row(model, prompt, sample.ids)
            torch.testing.assert_close(sample.logps, expected, rtol=0, atol=1e-4)
            longest = max(longest, len(sample.ids))
    assert longest > 4, "the state has to matter"


@pytest.mark.parametrize("family", STATEFUL)
def test_models_with_a_state_are_sampled_with_it(family):
    model = small_model(family, vocab=30, seed=3)
    check_samples(model)
    kind = UncachedModel if family == "rwkv" else CachedModel
    assert type(sampling_model(models_of(model), "policy", 1.0)) is kind


def forgetting(model):
    """The model, but it takes no notice of a cache: each token is the first one."""
    forward = model.forward

    def without_cache(input_ids, use_cache=None, past_key_values=None, logits_to_keep=0, **_):
        return forward(input_ids, use_cache=False, logits_to_keep=logits_to_keep)

    model.forward = without_cache
    return model


def test_a_cache_that_is_ignored_is_noticed_and_left_out(caplog):
    model = forgetting(small_model(vocab=30, seed=4))
    with caplog.at_level(logging.WARNING, logger="alignkit"):
        check_samples(model)
        check_samples(model)
    (record,) = caplog.records
    assert "LlamaForCausalLM without its cache, which is slow: with the cache they differ by" in (
        record.getMessage()
    )


def test_models_that_fail_with_a_cache_are_sampled_without():
    model = small_model(vocab=30, seed=5)
    forward = model.forward

    def refusing(input_ids, use_cache=None, **arguments):
        if use_cache:
            raise ValueError("this model has a cache of its own")
        return forward(input_ids, use_cache=False, **arguments)

    model.forward = refusing
    check_samples(model)


def test_a_model_whose_rows_depend_on_each_other_is_refused():
    model = small_model(vocab=30, seed=6)
    forward = model.forward

    def mixing(input_ids, **arguments):
        output = forward(input_ids, **arguments)
        output.logits = output.logits * len(input_ids)
        return output

    model.forward = mixing
    with pytest.raises(ModelError, match=r"other log-probs token by token .* cannot sample") as e:
        HFSampler(OneModel(model, models_of(model).tokenizer), max_new_tokens=3).sample(
            PROMPTS, Draw(2), step=0, prompt_ids=range(4)
        )
    assert e.value.exit_code == 4


@pytest.mark.parametrize("autocast", [True, False])
def test_rounding_of_autocast_is_no_wrong_cache(monkeypatch, autocast):
    """What bfloat16 rounds off is more than float32 may differ by; a CPU's autocast counts too,
    which a pair enters with its model.
    """
    model = small_model(vocab=30, seed=8)
    models = models_of(model)
    forward = model.forward

    @functools.wraps(forward)
    def rounding(input_ids, use_cache=None, **arguments):
        output = forward(input_ids, use_cache=use_cache, **arguments)
        if use_cache:
            output.logits = output.logits + 0.02 * (torch.arange(30) % 2)
        return output

    model.forward = rounding
    entered = models.model

    @contextmanager
    def in_autocast(name="policy"):
        with entered(name) as inner, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            yield inner

    monkeypatch.setattr(models, "model", in_autocast)
    kind = type(sampling_model(models, "policy", 1.0))
    assert kind is (CachedModel if autocast else UncachedModel)


def test_a_model_is_tried_once():
    model, calls = small_model(vocab=30, seed=7), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    sampling_model(models_of(model), "policy", 1.0)
    tried = len(calls)
    sampling_model(models_of(model), "policy", 1.0)
    assert len(calls) == tried > 0


@pytest.mark.skipif(not CASE.exists(), reason="the shared cases are not there")
def test_an_online_run_on_mamba_samples_what_it_trains(tmp_path):
    rows = [{"prompt": text} for text in ("what is 0+0?", "what is 1+1?", "hello", "a b c")]
    (tmp_path / "mine.py").write_text(
        "def score(prompts, completions, **_): return [float(len(c)) for c in completions]\n"
    )
    code = run(
        *("train", "rloo", f"model.name_or_path={CASE}", f"output_dir={tmp_path / 'out'}"),
        f"data.train={write_rows(tmp_path / 'prompts.jsonl', rows)}",
        f"rewards.0.function={tmp_path / 'mine.py'}:score",
        *("rollout.max_new_tokens=8", "rollout.completions=2", "train.steps=2"),
        *("train.batch_size=4", "train.log_samples_every=0"),
    )
    assert code == 0
    metrics = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert all(row["sampling/logp_difference_max"] < 1e-4 for row in metrics if "loss" in row)
