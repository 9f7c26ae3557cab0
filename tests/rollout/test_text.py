"""Token ids as text."""

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from alignkit.rollout.text import as_reply, decode, decode_after, decode_all


def tokenizer():
    """Words that carry their space in front, as SentencePiece has them; alone, the first space is
    dropped.
    """
    inner = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "▁a": 2, "▁b": 3}, unk_token="<s>"))
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def test_special_tokens_are_not_text():
    assert decode(tokenizer(), torch.tensor([0, 2, 3, 1])) == "a b"


def test_all_completions_of_each_prompt():
    rows = [[torch.tensor([2]), torch.tensor([3, 1])], []]
    assert decode_all(tokenizer(), rows) == [["a", "b"], []]


def test_a_completion_keeps_the_space_that_follows_its_prompt():
    ids = torch.tensor([3, 1])
    assert decode(tokenizer(), ids) == "b"
    assert decode_after(tokenizer(), torch.tensor([0, 2]), ids) == " b"


def test_a_reply_has_the_form_of_its_prompt():
    assert as_reply("plain", "a b") == "a b"
    chat = [{"role": "user", "content": "hello"}]
    assert as_reply(chat, "a b") == [{"role": "assistant", "content": "a b"}]
