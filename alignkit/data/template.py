"""Messages as text through a chat template, within limits: no template may run for ever, and the
date that it prints is the run's.
"""

import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from alignkit.config.data import DataConfig
from alignkit.data.messages import Message, checked_unicode
from alignkit.data.template_time import with_time
from alignkit.data.verdicts import BadRow
from alignkit.distributed import deadline
from alignkit.errors import AlignkitError, ConfigError, DataError, ModelError

MAX_SECONDS = 10.0  # for one conversation
MAX_TEMPLATE = 1 << 20  # bytes of a template file; those of known models have less than 50,000
FREE_LENGTH = 1_000_000  # characters of rendered text that are never too many
MAX_GROWTH = 20  # above that: characters of text per character of the conversation

# A conversation by which the form of contents that a template reads is recognised.
SMALL_TALK: list[Message] = [
    {"role": "user", "content": "question-7351"},
    {"role": "assistant", "content": "answer-7351"},
]

CLOSING_TAG = "</think>"  # the end of a thought inside an answer
HIDDEN_TAG = "\U000fff00"  # stands for it in messages whose thoughts the template must not see


class ChatTemplate:
    """The chat template of a tokenizer, or the one that the recipe gives. Raises ModelError when
    there is none.
    """

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.given = given_template(config)
        self.now = _moment(config.template_time)
        self.reads_parts: dict[str, bool] = {}  # template -> whether it reads contents in parts
        if self.given is None and not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "the rows are conversations, but the tokenizer has no chat template; "
                "give one with data.chat_template (Jinja text or a path), "
                "use an instruction-tuned model, or turn the rows into plain text"
            )

    def text(
        self, messages: list[Message], options: dict[str, Any], *, prompt: bool = False
    ) -> str:
        """`messages` as text; a `prompt` ends where the assistant begins to write.

        Raises BadRow where the template refuses them, and ConfigError or ModelError (by where the
        template comes from) where it does not come to an end.
        """
        try:
            text = self._text(messages, options, prompt)
        except BadRow:
            # Some templates want the arguments of a tool call as an object, others as JSON text.
            in_other_form = _with_other_arguments(messages)
            if in_other_form is None:
                raise
            text = self._text(in_other_form, options, prompt)

        text = text.replace(HIDDEN_TAG, CLOSING_TAG)
        return checked_unicode(text, "the rendered conversation")

    def ids(self, messages: Sequence[Message], *, prompt: bool = False) -> list[int]:
        """The token ids of `text`, for conversations that are no rows. Raises DataError where the
        template refuses them.
        """
        try:
            text = self.text(list(messages), {}, prompt=prompt)
        except BadRow as bad:
            raise DataError(f"the chat template refuses a conversation: {bad.detail}") from None
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text(self, messages: list[Message], options: dict[str, Any], prompt: bool) -> str:
        from jinja2 import TemplateSyntaxError

        try:
            template = self.tokenizer.get_chat_template(self.given, options.get("tools"))
            if self._reads_parts(template):
                messages = _in_parts(messages)
            text = self._rendered(template, messages, options, prompt=prompt)
        except TimeoutError:
            raise self._fault(
                f"runs for more than {MAX_SECONDS:.0f} s on one conversation"
            ) from None
        except (MemoryError, OverflowError, RecursionError) as error:
            raise self._fault(
                f"does not come to an end ({type(error).__name__}) on one conversation"
            ) from None
        except TemplateSyntaxError as error:
            raise self._fault(
                f"is not valid Jinja (line {error.lineno}: {error.message})"
            ) from None
        except Exception as error:
            # A template refuses a conversation by raising, and can raise whatever Python can.
            raise BadRow("template", str(error) or type(error).__name__) from None

        if len(text) > FREE_LENGTH:
            given = len(repr(messages)) + len(repr(options))
            if len(text) > FREE_LENGTH + MAX_GROWTH * given:
                raise self._fault(
                    f"makes {len(text):,} characters of a conversation of about {given:,}"
                )
        return text

    def _rendered(
        self, template: str, messages: list[Message], options: dict[str, Any], *, prompt: bool
    ) -> str:
        """What `template` makes of `messages`. Raises whatever it raises, and TimeoutError."""

        def render() -> str:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                chat_template=with_time(template, self.now),
                tokenize=False,
                add_generation_prompt=prompt,
                **options,
            )
            return text

        return _in_time(MAX_SECONDS, render)

    def _reads_parts(self, template: str) -> bool:
        """Whether `template` writes contents in parts alone, as templates of vision models do: of a
        content that is a text they write nothing, or they refuse it.
        """
        if template not in self.reads_parts:
            as_text, as_parts = (
                self._writes(template, messages) for messages in (SMALL_TALK, _in_parts(SMALL_TALK))
            )
            self.reads_parts[template] = as_parts and not as_text
        return self.reads_parts[template]

    def _writes(self, template: str, messages: list[Message]) -> bool:
        """Whether the words of SMALL_TALK are in what `template` makes of `messages`."""
        try:
            text = self._rendered(template, messages, {}, prompt=False)
        except TimeoutError:  # it would not come to an end with the row either
            raise
        except Exception:  # it refuses them in this form
            return False
        return all(message["content"] in text for message in SMALL_TALK)

    def _fault(self, what: str) -> AlignkitError:
        """The error for a template that `what`, whatever the conversation is."""
        if self.given is None:
            return ModelError(
                f"the tokenizer's chat template {what}; give another one with data.chat_template"
            )
        return ConfigError(f"data.chat_template {what}; correct it")


def given_template(config: DataConfig) -> str | None:
    """`data.chat_template` as Jinja text (it may be a path), or None for the tokenizer's own.

    Raises ConfigError.
    """
    given = config.chat_template
    if given is None or "{" in given:
        return given

    path = Path(given)
    if not path.is_file():
        raise ConfigError(
            f"data.chat_template: {given} is neither a Jinja template nor a file that holds one"
        )
    if path.stat().st_size > MAX_TEMPLATE:
        raise ConfigError(
            f"data.chat_template: {given} has {path.stat().st_size:,} bytes; "
            f"a template may have {MAX_TEMPLATE:,}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"data.chat_template: {given} is not UTF-8 text: {error}") from None


def _moment(template_time: str) -> datetime | None:
    """The time that templates are shown; None for the time at which they ask."""
    return None if template_time == "auto" else datetime.fromisoformat(template_time)


def _in_parts(messages: list[Message]) -> list[Message]:
    """`messages` with each content as a list of one text."""
    return [
        message | {"content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _with_other_arguments(messages: list[Message]) -> list[Message] | None:
    """`messages` with the arguments of every tool call in the other form, JSON text for an object
    and an object for JSON text; None where there are no such arguments.
    """
    changed = False
    converted = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, dict) else {}
            arguments = _other_form(function.get("arguments"))
            if arguments is not None:
                changed = True
                function = function | {"arguments": arguments}
                call = call | {"function": function} if "function" in call else function
            calls.append(call)
        converted.append(message | {"tool_calls": calls} if calls else message)
    return converted if changed else None


def _other_form(arguments: object) -> object:
    if isinstance(arguments, dict):
        return json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        return None
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _in_time(seconds: float, call: Callable[[], str]) -> str:
    """The result of `call`. TimeoutError after `seconds`.

    A timer costs next to nothing, but reaches the main thread alone.
    """
    if threading.current_thread() is threading.main_thread():
        with _timer(seconds):
            return call()
    try:
        return deadline.in_thread(seconds, "a chat template", call)
    except deadline.TimeIsUp:
        raise TimeoutError from None


@contextmanager
def _timer(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the body after `seconds`."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, stop)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
