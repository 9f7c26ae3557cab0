"""Top-k, nucleus and min-p are transformers' own rules; stop texts end a completion where they end."""

from itertools import chain

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from world import save_model

from alignkit.batches import Draw
from alignkit.errors import ConfigError
from alignkit.rollout import HFSampler
from alignkit.rollout.generate import OneModel
from alignkit.rollout.truncation import StopTexts, Truncation


def load(folder):
    save_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return OneModel(model, AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize(
    "rules",
    [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.8, "min_p": 0.2}],
    ids=str,
)
def test_the_laws_are_transformers(rules):
    logits = 2 * torch.randn(50, 17, generator=torch.Generator().manual_seed(0)).double()
    warpers = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    expected = logits
    for name, warper in warpers.items():
        if name in rules:
            expected = warper(rules[name])(None, expected)
    found = Truncation(**rules)(logits.log_softmax(-1))
    torch.testing.assert_close(found, expected.log_softmax(-1))
    assert found.isinf().any()


def test_nothing_is_left_out_by_default():
    logprobs = torch.randn(4, 9).log_softmax(-1)
    assert torch.equal(Truncation()(logprobs), logprobs)
    with pytest.raises(ConfigError, match="top_p 0"):
        Truncation(top_p=0)


def test_a_completion_ends_with_the_token_that_completes_a_stop_text(tmp_path):
    models = load(tmp_path)
    prompts = [torch.tensor([1, 5]), torch.tensor([1, 7, 8])]
    settings = {"max_new_tokens": 12, "seed": 3}
    free = HFSampler(models, **settings).sample(prompts, Draw(20), step=0, prompt_ids=[0, 1])
    stops = ["w5", "w6 w7"]
    stopped = HFSampler(models, **settings, stop=stops).sample(
        prompts, Draw(20), step=0, prompt_ids=[0, 1]
    )
    cut = 0
    for one, other in zip(chain(*free), chain(*stopped), strict=True):
        texts = [models.tokenizer.decode(one.ids[: n + 1]) for n in range(len(one.ids))]
        ends = [n for n, text in enumerate(texts) if any(stop in text for stop in stops)]
        length = ends[0] + 1 if ends else len(one.ids)
        assert other.ids.tolist() == one.ids[:length].tolist()
        torch.testing.assert_close(other.logps, one.logps[:length])
        assert other.ended == (bool(ends) or one.ended)
        cut += length < len(one.ids)
    assert cut > 5


@pytest.mark.parametrize("text", ["", "End", "w5w6"])
def test_a_text_that_no_tokens_make_is_refused(tmp_path, text):
    tokenizer = load(tmp_path).tokenizer
    with pytest.raises(ConfigError, match="cannot make"):
        StopTexts(["w5", text], tokenizer)
