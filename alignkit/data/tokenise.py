"""From checked examples to bundles: where the prompt ends, BOS once, EOS at most once, the cut at
max_length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignkit.batches import Bundle
from alignkit.config.data import DataConfig
from alignkit.data.chat import Renderer, Span, chat_template, common_prefix
from alignkit.data.examples import BadRow, Example
from alignkit.data.report import Report
from alignkit.errors import ConfigError, ModelError

Ids = list[int]


@dataclass(frozen=True)
class Rendered:
    """An example as text. `prompt` is None where it is implicit; no spans = the whole completion is
    trained.
    """

    example: Example
    prompt: str | None
    texts: list[str]
    spans: list[list[Span]]


class Tokeniser:
    """Text to token ids under the rules for BOS and EOS. Chats are tokenised as they are: their
    template wrote both.
    """

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.bos = tokenizer.bos_token_id
        self.eos = tokenizer.eos_token_id
        self.adds_eos = self.eos is not None and tokenizer("a")["input_ids"][-1:] == [self.eos]
        marked = {
            token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.special = marked | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
        if config.append_eos is True and self.eos is None:
            raise ModelError(
                "data.append_eos=true, but the tokenizer has no EOS token; give it one or set append_eos to auto"
            )

    def encode(self, texts: Sequence[str], chat: bool) -> list[Ids]:
        """Token ids of each text, without a trailing EOS that the tokenizer would add; equal texts
        are tokenised once.
        """
        unique = list(dict.fromkeys(texts))
        if not unique:
            return []
        encoded = self.tokenizer(
            unique,
            add_special_tokens=not chat,
            split_special_tokens=self.config.split_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        if self.adds_eos and not chat:
            encoded = [ids[:-1] for ids in encoded]
        table = dict(zip(unique, encoded))
        return [table[text] for text in texts]

    def bos_once(self, ids: Ids) -> Ids:
        """Without the second BOS that a text beginning with BOS gets from the tokenizer."""
        return ids[1:] if self.bos is not None and ids[:2] == [self.bos] * 2 else ids

    def with_eos(self, ids: Ids, chat: bool) -> Ids:
        """EOS behind a finished text, never a second one."""
        wanted = self.config.append_eos is True or (self.config.append_eos == "auto" and not chat)
        return (
            [*ids, self.eos] if wanted and self.eos is not None and ids[-1:] != [self.eos] else ids
        )

    def starts(self, rows: Sequence[Ids]) -> Ids:
        """[BOS] if every row begins with it, else nothing: what an empty prompt is before anything
        stands in for it.
        """
        return (
            [self.bos]
            if all(self.bos is not None and ids[:1] == [self.bos] for ids in rows)
            else []
        )

    @property
    def stand_in(self) -> int | None:
        """What an empty prompt becomes: BOS, else EOS."""
        token: int | None = self.eos if self.bos is None else self.bos
        return token


def tokenise(
    examples: Sequence[Example], config: DataConfig, tokenizer: Any, report: Report, family: str
) -> list[Bundle]:
    """Bundles of `examples`; every row that is dropped or worth a word is counted in `report`."""
    tokeniser = Tokeniser(tokenizer, config)
    bundles: dict[int, Bundle] = {}
    for chat in (False, True):
        chosen = [(place, made) for place, made in enumerate(examples) if made.chat == chat]
        rendered = _render(chosen, config, tokenizer, report)
        _count_special(rendered, tokeniser, report)
        prompts = tokeniser.encode([r.prompt or "" for _, r in rendered], chat)
        joints = iter(tokeniser.encode([text for _, r in rendered for text in r.texts], chat))
        for (place, r), prompt in zip(rendered, prompts):
            rows = [next(joints) for _ in r.texts]
            try:
                bundles[place] = _bundle(r, prompt, rows, tokeniser, report, family)
            except BadRow as bad:
                report.add(bad.verdict, r.example.number, bad.detail)
    return [bundles[place] for place in sorted(bundles)]


def _render(
    examples: list[tuple[int, Example]], config: DataConfig, tokenizer: Any, report: Report
) -> list[tuple[int, Rendered]]:
    made: list[tuple[int, Rendered]] = []
    if examples and examples[0][1].chat and config.split_special_tokens:
        raise ConfigError(
            "data.split_special_tokens=true is for plain text; a chat template is made of special tokens"
        )
    renderer = (
        Renderer(tokenizer, chat_template(config)) if examples and examples[0][1].chat else None
    )
    for place, example in examples:
        if renderer is None:
            prompt = example.prompt if isinstance(example.prompt, str) else None
            texts = [(prompt or "") + str(completion) for completion in example.completions]
            made.append((place, Rendered(example, prompt, texts, [[] for _ in texts])))
            continue
        try:
            prompt, texts, spans, lost = renderer.render(example)
        except BadRow as bad:
            report.add(bad.verdict, example.number, bad.detail)
            continue
        if lost:
            report.add("untrained_turn", example.number)
        made.append((place, Rendered(example, prompt, texts, spans)))
    return made


def _count_special(
    rendered: Sequence[tuple[int, Rendered]], tokeniser: Tokeniser, report: Report
) -> None:
    """Count rows whose own text (not the template's) holds a special token that will be read as
    one.
    """
    if tokeniser.config.split_special_tokens:
        return
    for _, r in rendered:
        parts = [r.example.prompt or "", *r.example.completions]
        text = "\0".join(
            p if isinstance(p, str) else "\0".join(m["content"] for m in p) for p in parts
        )
        found = next((word for word in tokeniser.special if word in text), None)
        if found:
            report.add("special_tokens", r.example.number, found)


def _bundle(
    r: Rendered, prompt: Ids, rows: list[Ids], tokeniser: Tokeniser, report: Report, family: str
) -> Bundle:
    """One bundle. The prompt is what all rows and the prompt alone have in common, so that a token
    that spans the end of the prompt belongs to the completions.
    """
    number = r.example.number
    chat = r.example.chat
    if any(tokeniser.bos_once(ids) is not ids for ids in rows):
        report.add("bos_once", number)
    prompt = tokeniser.bos_once(prompt)
    rows = [tokeniser.bos_once(ids) for ids in rows]
    if chat and not r.prompt:
        prompt = tokeniser.starts(rows)
    if r.prompt is not None and any(len(ids) <= common_prefix([prompt, ids]) for ids in rows):
        raise BadRow("empty", "a completion has no token")
    masks = [
        _mask(text, ids, spans, tokeniser, chat) for text, ids, spans in zip(r.texts, rows, r.spans)
    ]
    rows = [tokeniser.with_eos(ids, chat) for ids in rows]
    masks = [mask + mask[-1:] * (len(ids) - len(mask)) for mask, ids in zip(masks, rows)]
    length = _prompt_length(r, prompt, rows, tokeniser, report)
    if chat and not any(token in tokeniser.special.values() for token in rows[0][-3:]):
        report.add("no_end", number)
    if length == 0:
        prefix = _stand_in(r, tokeniser, report)
        rows = [[prefix, *ids] for ids in rows]
        masks = [[False, *mask] for mask in masks]
        length = 1
    if family == "sequence":
        rows = rows[:1]
        masks = masks[:1]
    return _cut(r.example, rows, masks, length, tokeniser, report)


def _prompt_length(
    r: Rendered, prompt: Ids, rows: list[Ids], tokeniser: Tokeniser, report: Report
) -> int:
    """Tokens of the prompt, 0 if there is none; each row keeps at least one token behind it."""
    implicit = r.prompt is None or (r.example.chat and not r.prompt and len(rows) > 1)
    whole = rows if r.prompt is None else [prompt, *rows]
    length = min(common_prefix(whole), min(map(len, rows)) - 1)
    if implicit and length <= len(tokeniser.starts(rows)):
        report.add("no_common_prefix", r.example.number)
    elif r.prompt is not None and length < len(prompt):
        report.add("boundary", r.example.number)
    return length


def _mask(text: str, ids: Ids, spans: list[Span], tokeniser: Tokeniser, chat: bool) -> list[bool]:
    """Which tokens of the row are trained: all, or those of the assistant's spans; a token that
    spans the start of a turn belongs to it.
    """
    if not spans:
        return [True] * len(ids)
    mask = [False] * len(ids)
    for start, end in spans:
        parts = tokeniser.encode([text[:start], text[:end]], chat)
        first, last = (common_prefix([ids, tokeniser.bos_once(part)]) for part in parts)
        mask[first:last] = [True] * (last - first)
    return mask


def _stand_in(r: Rendered, tokeniser: Tokeniser, report: Report) -> int:
    token = tokeniser.stand_in
    if token is None:
        raise BadRow("no_prompt")
    name = "EOS" if tokeniser.bos is None else "BOS"
    report.add(
        "empty_prompt",
        r.example.number,
        f"{name} ({tokeniser.tokenizer.convert_ids_to_tokens(token)}) stands in for it",
    )
    return token


def _cut(
    example: Example,
    rows: list[Ids],
    masks: list[list[bool]],
    length: int,
    tokeniser: Tokeniser,
    report: Report,
) -> Bundle:
    """Keep the first max_length tokens of each row, if something to train on is left."""
    limit = tokeniser.config.max_length
    longest = max(map(len, rows))
    report.prompt_lengths.append(length)
    report.lengths.append(longest)
    cut = [ids[length:limit] for ids in rows]
    kept = [mask[length:limit] for mask in masks]
    if not all(any(mask) for mask in kept):
        raise BadRow("overlong", f"the prompt has {length} tokens")
    if len(cut) > 1 and all(ids == cut[0] for ids in cut):
        raise BadRow("identical", "their tokens are equal as far as data.max_length")
    if longest > limit:
        report.add("truncated", example.number)
    if min(longest, limit) > tokeniser.tokenizer.model_max_length:
        report.add("beyond_context", example.number)
    return Bundle(
        torch.tensor(rows[0][:length]),
        [torch.tensor(ids) for ids in cut],
        [torch.tensor(mask) for mask in kept],
        uid=example.uid,
        rows={} if example.label is None else {"label": torch.tensor([example.label])},
    )
