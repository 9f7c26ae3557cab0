"""Messages as text through a chat template, within limits: no template may run for ever, and the
date that it prints is the run's.
"""

import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

from alignkit.config.data import DataConfig
from alignkit.data.messages import Message, checked_unicode
from alignkit.data.verdicts import BadRow
from alignkit.errors import AlignkitError, ConfigError, ModelError

MAX_SECONDS = 10.0  # for one conversation
MAX_TEMPLATE = 1 << 20  # bytes of a template file; those of known models have less than 50,000
FREE_LENGTH = 1_000_000  # characters of rendered text that are never too many
MAX_GROWTH = 20  # above that: characters of text per character of the conversation

# How a template asks for the date. The templates of known models write the format as a literal.
DATE_CALL = re.compile(r"""strftime_now\(\s*(?:'([^'\n]*)'|"([^"\n]*)")\s*\)""")

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

    def _text(self, messages: list[Message], options: dict[str, Any], prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            template = self.tokenizer.get_chat_template(self.given, options.get("tools"))
            with _time_limit(MAX_SECONDS):
                text: str = self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=_with_date(template, self.now),
                    tokenize=False,
                    add_generation_prompt=prompt,
                    **options,
                )
        except TimeoutError:
            raise self._fault(f"runs for more than {MAX_SECONDS:.0f} s") from None
        except (MemoryError, OverflowError, RecursionError) as error:
            raise self._fault(f"does not come to an end ({type(error).__name__})") from None
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            # what templates raise on conversations that they refuse
            raise BadRow("template", str(error) or type(error).__name__) from None

        if len(text) > FREE_LENGTH:
            given = len(repr(messages)) + len(repr(options))
            if len(text) > FREE_LENGTH + MAX_GROWTH * given:
                raise self._fault(f"makes {len(text):,} characters of about {given:,}")
        return text

    def _fault(self, what: str) -> AlignkitError:
        """The error for a template that `what` on one conversation."""
        if self.given is None:
            return ModelError(
                f"the tokenizer's chat template {what} on one conversation; "
                "give another one with data.chat_template"
            )
        return ConfigError(f"data.chat_template {what} on one conversation; correct its loops")


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


@lru_cache(maxsize=8)
def _with_date(template: str, now: datetime | None) -> str:
    """`template` with the date that it would print written into it, so that a run that is resumed
    on another day sees the same text.
    """
    if now is None:
        return template
    return DATE_CALL.sub(
        lambda call: json.dumps(now.strftime(call[1] or call[2] or ""), ensure_ascii=False),
        template,
    )


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


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the body after `seconds`. Signals reach the main thread alone, so in
    another thread (and on systems without them) there is no limit.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, stop)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
