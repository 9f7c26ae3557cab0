"""From checked examples to tokens: where the prompt ends, which tokens are trained, and the cut at
max_length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from alignkit.config.data import DataConfig
from alignkit.data.chat import Rendered, Renderer
from alignkit.data.encode import Ids, TextEncoder
from alignkit.data.examples import Example
from alignkit.data.report import Report
from alignkit.data.turns import Span, common_prefix
from alignkit.data.verdicts import BadRow
from alignkit.errors import ConfigError


@dataclass(frozen=True)
class TokenRow:
    """The prompt and one completion, as tokens."""

    ids: Ids
    mask: list[bool]  # which of them are trained, as far as they belong to the completion


@dataclass(frozen=True)
class Cut:
    """An example as tokens, within the limit on their number."""

    uid: str
    label: bool | None
    margin: float | None
    prompt: Ids
    completions: list[Ids]
    masks: list[list[bool]]


class Tokeniser:
    """From examples to tokens, for one tokenizer and `family` of objectives."""

    def __init__(self, config: DataConfig, tokenizer: Any, family: str) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.family = family

    @cached_property
    def encoder(self) -> TextEncoder:
        """Made when the first rows come, so that what is wrong with the rows is said first."""
        return TextEncoder(self.tokenizer, self.config)

    @cached_property
    def renderer(self) -> Renderer:
        """Applies the chat template. ModelError where there is none."""
        return Renderer(self.encoder)

    def cuts(self, examples: Sequence[Example], report: Report) -> list[Cut]:
        """`examples` as tokens, in their order.

        Every row that is dropped or worth a word is counted in `report`.

        Raises ModelError for a tokenizer without the chat template or the EOS that is needed, and
        ConfigError for options that do not go with chats.
        """
        cuts: dict[int, Cut] = {}  # by row number

        # Plain text and chats follow different rules for special tokens, and each kind is encoded
        # in one call.
        for chat in (False, True):
            of_kind = [example for example in examples if example.chat == chat]
            rendered = self._render_chats(of_kind, report) if chat else _render_texts(of_kind)
            _count_special_tokens(rendered, self.encoder, report)

            prompts = self.encoder.encode([r.prompt or "" for r in rendered], chat)
            texts = [text for r in rendered for text in r.texts]
            encoded = iter(self.encoder.encode(texts, chat))
            for r, prompt in zip(rendered, prompts):
                rows = [next(encoded) for _ in r.texts]
                try:
                    cut = _tokenised(r, prompt, rows, self.encoder, report, self.family)
                except BadRow as bad:
                    report.add_bad(bad, r.example.number)
                else:
                    cuts[r.example.number] = cut

        return [cuts[e.number] for e in examples if e.number in cuts]

    def _render_chats(self, examples: Sequence[Example], report: Report) -> list[Rendered]:
        """Conversations: through the chat template. Rows that it refuses are counted. For sequences
        the completions are demonstrations.
        """
        if not examples:
            return []
        if self.config.split_special_tokens:
            raise ConfigError(
                "data.split_special_tokens=true is for plain text; "
                "a chat template is made of special tokens"
            )

        rendered = []
        for example in examples:
            try:
                rendered.append(self.renderer.render(example, teach=self.family == "sequence"))
            except BadRow as bad:
                report.add_bad(bad, example.number)
                continue
            for verdict in sorted(rendered[-1].notes):
                report.add(verdict, example.number)
        return rendered


def unpaired(cuts: Sequence[Cut]) -> list[Cut]:
    """Labelled examples: those that have a label already as they are, and each pair as two, of which
    the chosen completion is desirable.
    """
    labelled = []
    for cut in cuts:
        if cut.label is not None:
            labelled.append(cut)
            continue
        for ids, mask, label in zip(cut.completions, cut.masks, (True, False)):
            labelled.append(Cut(cut.uid, label, None, cut.prompt, [ids], [mask]))
    return labelled


def _render_texts(examples: Sequence[Example]) -> list[Rendered]:
    """Plain text: the prompt and each completion, one behind the other."""
    rendered = []
    for example in examples:
        prompt = None if example.prompt is None else str(example.prompt)
        texts = [(prompt or "") + str(completion) for completion in example.completions]
        rendered.append(Rendered(example, prompt, texts, [[] for _ in texts]))
    return rendered


def _count_special_tokens(
    rendered: Sequence[Rendered], encoder: TextEncoder, report: Report
) -> None:
    """Count rows whose own text (not the template's) holds a
    special token that will be read as one.
    """
    if encoder.config.split_special_tokens:
        return
    for r in rendered:
        texts: list[str] = []
        for part in (r.example.prompt or "", *r.example.completions):
            texts += [part] if isinstance(part, str) else [m["content"] for m in part]
        special = next((token for token in encoder.special for t in texts if token in t), None)
        if special:
            report.add("special_tokens", r.example.number, special)


def _tokenised(
    rendered: Rendered,
    prompt: Ids,
    rows: list[Ids],
    encoder: TextEncoder,
    report: Report,
    family: str,
) -> Cut:
    """An example from the token ids of the prompt alone and of each row, prompt and completion.

    The prompt is what all rows and the prompt alone have in common, so that a token that spans the
    end of the prompt belongs to the completions.
    """
    number = rendered.example.number
    chat = rendered.example.chat

    # BOS comes once: from the tokenizer for plain text, from the template for chats.
    if any(encoder.has_second_bos(ids) for ids in rows):
        report.add("bos_once", number)
    rows = [encoder.without_second_bos(ids) for ids in rows]
    prompt = encoder.without_second_bos(prompt)
    if chat and not rendered.prompt:  # the template was not asked for an empty conversation
        prompt = encoder.common_bos(rows)

    if any(encoder.has_unknown(text, ids) for text, ids in zip(rendered.texts, rows)):
        report.add("unknown_tokens", number)

    # A completion needs a token of its own. An EOS behind it would not be one.
    if any(len(ids) <= common_prefix([prompt, ids]) for ids in rows):
        raise BadRow("empty", "a completion has no token")

    token_rows = []
    for text, ids, spans in zip(rendered.texts, rows, rendered.spans):
        mask = _mask(text, ids, spans, encoder, chat)
        ending = encoder.ending(ids, chat)
        token_rows.append(TokenRow([*ids, *ending], mask + mask[-1:] * len(ending)))
    if chat and not _ends_with_a_special_token(token_rows[0].ids, encoder):
        report.add("no_end", number)

    length = _prompt_length(rendered, prompt, token_rows, encoder, report)
    if length == 0:
        token = _stand_in(rendered, encoder, report)
        token_rows = [TokenRow([token, *row.ids], [False, *row.mask]) for row in token_rows]
        length = 1

    if family == "sequence":  # the others served to find the end of an implicit prompt
        token_rows = token_rows[:1]
    return _cut(rendered.example, token_rows, length, encoder, report)


def _mask(text: str, ids: Ids, spans: list[Span], encoder: TextEncoder, chat: bool) -> list[bool]:
    """Which tokens of `ids`, the tokens of `text`, are trained: all, or those of the assistant's
    spans. A token that spans the start of a turn belongs to it.
    """
    if not spans:
        return [True] * len(ids)

    mask = [False] * len(ids)
    for start, end in spans:
        before, until_end = encoder.encode([text[:start], text[:end]], chat)
        first = common_prefix([ids, encoder.without_second_bos(before)])
        last = common_prefix([ids, encoder.without_second_bos(until_end)])
        mask[first:last] = [True] * (last - first)
    return mask


def _ends_with_a_special_token(ids: Ids, encoder: TextEncoder) -> bool:
    """Whether a chat's end mark is there, perhaps with white space behind it."""
    special = set(encoder.special.values())
    last = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in special), None)
    return last is not None and not encoder.tokenizer.decode(ids[last + 1 :]).strip()


def _prompt_length(
    rendered: Rendered,
    prompt: Ids,
    token_rows: Sequence[TokenRow],
    encoder: TextEncoder,
    report: Report,
) -> int:
    """Tokens of the prompt, 0 if there is none; each row keeps at least one token behind it."""
    rows = [row.ids for row in token_rows]
    shared = common_prefix(rows if rendered.prompt is None else [prompt, *rows])
    length = min(shared, min(map(len, rows)) - 1)

    if rendered.prompt is None:
        nothing_shared = length <= len(encoder.common_bos(rows))
    else:
        nothing_shared = _dialogues_differ_from_the_first_turn(rendered.example)
    if nothing_shared:
        report.add("no_common_prefix", rendered.example.number)
    elif rendered.prompt is not None and length < len(prompt):
        report.add("boundary", rendered.example.number)
        if _trains_the_prompt(rendered):
            report.add("prompt_trained", rendered.example.number)
    return length


def _trains_the_prompt(rendered: Rendered) -> bool:
    """Whether what the last turn of a prompt says stands behind what the prompt and a row share: the
    template wrote it otherwise once an answer followed, so it is trained as if it were the answer.
    """
    turns = rendered.example.prompt
    if not isinstance(turns, list) or not turns or rendered.prompt is None:
        return False
    words = str(turns[-1].get("content") or "").strip()
    return any(
        not spans and words in text and words not in text[: common_prefix([rendered.prompt, text])]
        for text, spans in zip(rendered.texts, rendered.spans)
    )


def _dialogues_differ_from_the_first_turn(example: Example) -> bool:
    """Whether the completions of a chat without a prompt share no message."""
    if not example.chat or example.prompt:
        return False
    first_messages = [completion[0] for completion in example.completions]
    return any(message != first_messages[0] for message in first_messages)


def _stand_in(rendered: Rendered, encoder: TextEncoder, report: Report) -> int:
    """The token that an empty prompt becomes. Raises BadRow where the tokenizer has none."""
    token = encoder.stand_in
    if token is None:
        raise BadRow("no_prompt")
    name = "EOS" if encoder.bos is None else "BOS"
    written = encoder.tokenizer.convert_ids_to_tokens(token)
    report.add("empty_prompt", rendered.example.number, f"{name} ({written}) stands in for it")
    return token


def _cut(
    example: Example,
    token_rows: Sequence[TokenRow],
    length: int,
    encoder: TextEncoder,
    report: Report,
) -> Cut:
    """max_length tokens of each row, if something to train on is left; `length` is
    that of the prompt.
    """
    limit = encoder.config.max_length
    longest = max(len(row.ids) for row in token_rows)
    report.prompt_lengths[length] += 1
    report.lengths[longest] += 1

    # The prompt can make room for the completions; its last token has to stay.
    skipped = 0
    if encoder.config.truncate == "start":
        skipped = min(max(longest - limit, 0), length - 1)

    completions = [row.ids[length : limit + skipped] for row in token_rows]
    masks = [row.mask[length : limit + skipped] for row in token_rows]
    if not all(any(mask) for mask in masks):
        raise BadRow("overlong", f"the prompt has {length} tokens")
    if len(completions) > 1 and all(ids == completions[0] for ids in completions):
        raise BadRow("identical", "their tokens are equal as far as data.max_length")

    if longest > limit:
        report.add("truncated", example.number)
    if min(longest, limit) > encoder.tokenizer.model_max_length:
        report.add("beyond_context", example.number)
    prompt = token_rows[0].ids[skipped:length]
    return Cut(example.uid, example.label, example.margin, prompt, completions, masks)
