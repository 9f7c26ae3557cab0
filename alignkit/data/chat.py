"""Conversations as text: the chat template, and which characters of it the assistant wrote."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.config.data import DataConfig
from alignkit.data.examples import Example
from alignkit.data.messages import Message, Text, checked_unicode
from alignkit.data.verdicts import BadRow
from alignkit.errors import ConfigError, ModelError

Span = tuple[int, int]  # characters of a text, the end not included


@dataclass(frozen=True)
class Rendered:
    """An example as text."""

    example: Example
    prompt: str | None  # None where it is implicit
    texts: list[str]  # per completion the prompt and the completion together
    spans: list[list[Span]]  # per completion what is trained of its text; none = all of it
    lost_turns: int = 0  # assistant turns that could not be found in the text


class Renderer:
    """Applies the chat template of a tokenizer, or the one given. Raises ModelError when there is
    none.
    """

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self.tokenizer = tokenizer
        self.template = template
        if template is None and not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "the rows are conversations, but the tokenizer has no chat template; "
                "give one with data.chat_template (Jinja text or a path), "
                "use an instruction-tuned model, or turn the rows into plain text"
            )

    def text(
        self, messages: list[Message], options: dict[str, Any], *, prompt: bool = False
    ) -> str:
        """`messages` as text; a `prompt` ends where the assistant begins to write. Raises BadRow
        where the template refuses them.
        """
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=prompt,
                **options,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            # what templates raise on conversations that they refuse
            raise BadRow("template", str(error) or type(error).__name__) from None
        return checked_unicode(text, "the rendered conversation")

    def render(self, example: Example) -> Rendered:
        """`example`, whose parts are messages, as text. Raises BadRow."""
        options = dict(example.template)
        prompt = _messages(example.prompt)
        texts: list[str] = []
        spans: list[list[Span]] = []
        lost_turns = 0

        for completion in example.completions:
            messages = [*prompt, *_messages(completion)]
            text = self.text(messages, options)
            texts.append(text)
            if len(completion) == 1:  # one answer: it is everything behind the prompt
                spans.append([])
                continue

            turns = self._assistant_spans(text, messages, len(prompt), options)
            lost_turns += turns.count(None)
            spans.append([span for span in turns if span])
            if not spans[-1]:
                raise BadRow(
                    "template",
                    "the template changes every assistant turn; none can be found in the text",
                )

        prompt_text = self.text(prompt, options, prompt=True) if prompt else ""
        return Rendered(example, prompt_text, texts, spans, lost_turns)

    def _assistant_spans(
        self, text: str, messages: list[Message], first: int, options: dict[str, Any]
    ) -> list[Span | None]:
        """The characters of `text` that each assistant turn from `first` on wrote, None for a turn
        that cannot be found.

        A turn runs from where its generation prompt ends to where the conversation up to it ends.
        Templates that rewrite earlier turns (they drop old thoughts) are followed by looking for
        the turn's content and the end mark behind it; where what stands before the turn is
        rewritten too, it is given up rather than guessed.
        """
        spans: list[Span | None] = []
        for i in range(first, len(messages)):
            if messages[i]["role"] != "assistant":
                continue

            start = 0
            if i:
                if not text.startswith(self.text(messages[:i], options)):
                    spans.append(None)
                    continue
                start = common_prefix([text, self.text(messages[:i], options, prompt=True)])

            until_turn = self.text(messages[: i + 1], options)
            if text.startswith(until_turn):
                spans.append((start, len(until_turn)))
            else:
                spans.append(_rewritten_span(text, start, messages[i]["content"], until_turn))
        return spans


def chat_template(config: DataConfig) -> str | None:
    """`data.chat_template` as Jinja text (it may be a path), or None for the tokenizer's own.
    Raises ConfigError.
    """
    given = config.chat_template
    if given is None or "{" in given:
        return given
    if not Path(given).is_file():
        raise ConfigError(
            f"data.chat_template: {given} is neither a Jinja template nor a file that holds one"
        )
    return Path(given).read_text(encoding="utf-8")


def common_prefix(sequences: Sequence[Any]) -> int:
    """Length of the longest common prefix of texts, or of lists of token ids."""
    # The first and the last in lexical order differ no later than any other two.
    first = min(sequences)
    last = max(sequences)
    return next(
        (i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last))
    )


def _rewritten_span(text: str, start: int, content: str, until_turn: str) -> Span | None:
    """The characters of a turn whose thoughts the template dropped: its answer with the end mark
    that stands behind it in `until_turn`, the conversation up to and with the turn.
    """
    answer = content.split("</think>")[-1].strip()
    position = text.find(answer, start) if answer else -1
    if position < 0:
        return None
    end_mark = until_turn[until_turn.rfind(answer) + len(answer) :]
    end = position + len(answer) + len(end_mark)
    return (start, end) if text[:end].endswith(answer + end_mark) else None


def _messages(part: Text | None) -> list[Message]:
    assert not isinstance(part, str), "the parts of a conversation are messages by now"
    return part or []
