"""Conversations as text: the chat template, and which characters of it are the assistant's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.config.data import DataConfig
from alignkit.data.examples import BadRow, Example, Message, Text, check_unicode
from alignkit.errors import ConfigError, ModelError

Span = tuple[int, int]


def chat_template(config: DataConfig) -> str | None:
    """`data.chat_template` as Jinja text (it may be a path), or None for the tokenizer's own.
    Errors: ConfigError.
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
    # in lexical order the outermost two differ first
    shortest = min(sequences)
    longest = max(sequences)
    return next(
        (i for i, (a, b) in enumerate(zip(shortest, longest)) if a != b),
        min(len(shortest), len(longest)),
    )


def _turns(part: Text | None) -> list[Message]:
    assert not isinstance(part, str), "a conversation's parts are messages by now"
    return part or []


class Renderer:
    """Applies the chat template of a tokenizer, or the one given. Errors: ModelError when there is
    none.
    """

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self.tokenizer = tokenizer
        self.template = template
        if template is None and not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "the rows are conversations, but the tokenizer has no chat template; give one with data.chat_template "
                "(Jinja text or a path), use an instruction-tuned model, or turn the rows into plain text"
            )

    def text(
        self, messages: list[Message], options: dict[str, Any], *, prompt: bool = False
    ) -> str:
        """`messages` as text; a `prompt` ends where the assistant begins to write. Raises BadRow."""
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=prompt,
                **options,
            )
        except (
            TemplateError,
            TypeError,
            ValueError,
            KeyError,
        ) as error:  # what a template raises on turns it dislikes
            raise BadRow("template", str(error) or type(error).__name__) from None
        return check_unicode(text, "the rendered conversation")

    def render(self, made: Example) -> tuple[str | None, list[str], list[list[Span]], int]:
        """Prompt, K full texts, and per completion its assistant spans (none = all of it), and how
        many turns were lost.
        """
        options = dict(made.template)
        prompt = _turns(made.prompt)
        texts: list[str] = []
        spans: list[list[Span]] = []
        lost = 0
        for completion in made.completions:
            messages = [*prompt, *_turns(completion)]
            full = self.text(messages, options)
            texts.append(full)
            simple = len(completion) == 1
            found = [] if simple else self._spans(full, messages, len(prompt), options)
            lost += found.count(None)
            spans.append([span for span in found if span])
            if not simple and not spans[-1]:
                raise BadRow(
                    "template",
                    "the template changes every assistant turn; none can be found in the text",
                )
        return (self.text(prompt, options, prompt=True) if prompt else ""), texts, spans, lost

    def _spans(
        self, full: str, messages: list[Message], first: int, options: dict[str, Any]
    ) -> list[Span | None]:
        """Character ranges of `full` that each assistant turn from `first` on wrote, None where it
        cannot be found.

        A turn runs from where its generation prompt ends to where the conversation up to it ends.
        Templates that rewrite earlier turns (they drop old thoughts) are followed by looking for
        the turn's content and the end mark behind it; where what stands before the turn is
        rewritten too, it is given up rather than guessed.
        """
        spans: list[Span | None] = []
        for i in range(first, len(messages)):
            if messages[i]["role"] != "assistant":
                continue
            if i and not full.startswith(self.text(messages[:i], options)):
                spans.append(None)
                continue
            start = common_prefix([full, self.text(messages[:i], options, prompt=True)]) if i else 0
            upto = self.text(messages[: i + 1], options)
            if full.startswith(upto):
                spans.append((start, len(upto)))
                continue
            content = messages[i]["content"].split("</think>")[-1].strip()
            at = full.find(content, start) if content else -1
            mark = upto[upto.rfind(content) + len(content) :] if content else ""
            end = at + len(content) + len(mark)
            spans.append((start, end) if at >= 0 and full[:end].endswith(content + mark) else None)
        return spans
