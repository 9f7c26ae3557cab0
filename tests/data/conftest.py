"""Real tokenizers of every common kind, built here, and helpers to write rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the cat sat on the mat and looked at the other cats",
    "hello world, hello there! a worldly hello to the whole wide world",
    "Question: what is 12 times 3?\nAnswer: 12 times 3 is 36.",
] * 20

# The last user turn and what follows keep their thoughts; thoughts of earlier turns are dropped, as
# Qwen 3's template does.
CHATML = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 < ns.last %}{{ m.content.split('</think>')[-1].strip() }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind: byte-level BPE, nothing added at either end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end
    )


def metaspace() -> PreTrainedTokenizerFast:
    """SentencePiece's kind: a space before the first word, BOS in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    to_text = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = decoders.Sequence(to_text)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=450, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def word_level(*, both_ends: bool = False) -> PreTrainedTokenizerFast:
    """Whole words, without BOS; or one that itself adds BOS and EOS."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    )
    if not both_ends:
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>"
        )
    special_ids = [("<s>", 1), ("</s>", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=special_ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def chat() -> PreTrainedTokenizerFast:
    """The byte-level one with a thinking chat template."""
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|im_start|>"), AddedToken("<|im_end|>")]}
    )
    return tokenizer


KINDS = {
    "byte_level": byte_level,
    "metaspace": metaspace,
    "word_level": word_level,
    "both_ends": lambda: word_level(both_ends=True),
}


@pytest.fixture(scope="session")
def kinds() -> dict[str, Any]:
    """One tokenizer of each kind by name."""
    return {name: make() for name, make in KINDS.items()} | {"chat": chat()}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write rows as JSONL and return the path."""

    def writer(*rows: Any, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return writer
