"""Conversations as text: the chat template, and which characters of it the assistant wrote."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from alignkit.data.encode import TextEncoder
from alignkit.data.examples import Example
from alignkit.data.messages import Message, Text, is_trained
from alignkit.data.template import CLOSING_TAG, HIDDEN_TAG, ChatTemplate
from alignkit.data.turns import Span, TurnFinder, Turns, common_prefix, split_thoughts
from alignkit.data.verdicts import BadRow

THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")  # of messages


@dataclass(frozen=True)
class Rendered:
    """An example as text."""

    example: Example
    prompt: str | None  # None where it is implicit
    texts: list[str]  # per completion the prompt and the completion together
    spans: list[list[Span]]  # per completion what is trained of its text; none = all of it
    notes: frozenset[str] = frozenset()  # verdicts on what the template did to it


class Renderer:
    """Applies a chat template to examples. Raises ModelError when there is none."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.template = ChatTemplate(encoder.tokenizer, encoder.config)
        self.finder = TurnFinder(self.template, encoder.special)

    def render(self, example: Example, *, teach: bool) -> Rendered:
        """`example`, whose parts are messages, as text. Raises BadRow.

        With `teach`, for objectives that imitate, the text holds what a model is to learn to write:
        the thoughts of every trained turn, and something to stop with. Without it, it is what the
        template makes of the conversation.
        """
        options = dict(example.template)
        prompt = _messages(example.prompt)
        notes: set[str] = set()
        turns = [
            self._turns(prompt, _messages(completion), options, notes, teach=teach)
            for completion in example.completions
        ]

        if prompt:
            prompt_text = self.template.text(prompt, options, prompt=True)
        else:  # everything that the completions share before the assistant's first word
            texts = [turn.text[: turn.spans[0][0]] for turn in turns]
            prompt_text = texts[0][: common_prefix(texts)]
        return Rendered(
            example,
            prompt_text,
            [turn.text for turn in turns],
            [turn.spans for turn in turns],
            frozenset(notes),
        )

    def _turns(
        self,
        prompt: list[Message],
        completion: list[Message],
        options: dict[str, Any],
        notes: set[str],
        *,
        teach: bool,
    ) -> Turns:
        """The text of `prompt` and `completion`, and where the assistant's turns stand in it: no
        span where the completion is one answer, which is everything behind the prompt.
        """
        messages = [*prompt, *completion]
        trained = [
            i
            for i, message in enumerate(messages)
            if i >= len(prompt) and message["role"] == "assistant" and is_trained(message)
        ]
        text = self.template.text(messages, options)
        messages, text = self._with_calls(messages, options, text)
        if teach:
            messages, text = self._with_thoughts(messages, trained, options, text)

        if prompt and len(completion) == 1:
            turns = Turns(text)
        else:
            turns = self.finder.find(messages, trained, options, text, teach=teach)
            if not turns.spans:
                raise BadRow(
                    "template",
                    "the template changes every assistant turn; none can be found in the text",
                )

        if teach and trained[-1] == len(messages) - 1:
            _append(turns, self.finder.stop(messages[-1], options, turns.text))
        _note_losses(messages, trained, turns, notes)
        return turns

    def _with_calls(
        self, messages: list[Message], options: dict[str, Any], text: str
    ) -> tuple[list[Message], str]:
        """`messages` and their text, so that the calls of turns without content are in it: some
        templates write them only where there is no content at all, not even an empty one.
        """
        silent = [m for m in messages if m.get("tool_calls") and not m.get("content")]
        if all(name in text for message in silent for name in _called(message)):
            return messages, text

        without_content = [
            {key: value for key, value in message.items() if key != "content"}
            if message in silent
            else message
            for message in messages
        ]
        try:
            other_text = self.template.text(without_content, options)
        except BadRow:
            return messages, text
        if all(name in other_text for message in silent for name in _called(message)):
            return without_content, other_text
        return messages, text

    def _with_thoughts(
        self,
        messages: list[Message],
        trained: Sequence[int],
        options: dict[str, Any],
        text: str,
    ) -> tuple[list[Message], str]:
        """`messages` and their text, for a template that cuts thoughts even out of the last turn:
        the tag by which it knows them is hidden from it.
        """
        thoughtful = [i for i in trained if CLOSING_TAG in messages[i].get("content", "")]
        if not thoughtful:
            return messages, text

        last = thoughtful[-1]
        thoughts = _thoughts(messages[last])
        if last + 1 < len(messages) and not _all_in(thoughts, text):
            text_as_last = self.template.text(messages[: last + 1], options)
        else:
            text_as_last = text
        if _all_in(thoughts, text_as_last):
            return messages, text

        hidden = [
            message | {"content": message["content"].replace(CLOSING_TAG, HIDDEN_TAG)}
            if i in thoughtful
            else message
            for i, message in enumerate(messages)
        ]
        return hidden, self.template.text(hidden, options)


def _append(turns: Turns, stop: str) -> None:
    """Let the text, and the last turn if the text ends with it, end with `stop`."""
    start, end = turns.spans[-1] if turns.spans else (0, -1)
    if end == len(turns.text):
        turns.spans[-1] = (start, end + len(stop))
    turns.text += stop


def _note_losses(
    messages: Sequence[Message], trained: Sequence[int], turns: Turns, notes: set[str]
) -> None:
    """Add the verdicts on what the template left out of the text, and of the trained turns."""
    if turns.lost:
        notes.add("untrained_turn")
    spans = turns.spans or [(0, len(turns.text))]
    own = "\n".join(turns.text[start:end] for start, end in spans)
    taught = [messages[i] for i in trained]

    if not all(_all_in(_thoughts(message), own) for message in taught):
        notes.add("thoughts_dropped")
    if not all(_all_in(_called(message), own) for message in taught):
        notes.add("calls_dropped")
    if not turns.lost and not all(_words(message) in own for message in taught):
        notes.add("words_dropped")
    if leaves_out_others(messages, turns.text):
        notes.add("message_dropped")


def leaves_out_others(messages: Sequence[Message], text: str) -> bool:
    """Whether something that others than the assistant say is not in `text`, the conversation."""
    others = (message for message in messages if message["role"] != "assistant")
    return not all(_words(message) in text for message in others)


def _words(message: Message) -> str:
    """What a turn says, without the thoughts before it and the white space around it."""
    return split_thoughts(message.get("content") or "")[1].strip()


def _thoughts(message: Message) -> list[str]:
    """What a turn thinks before it answers, in its content or under a key of its own."""
    inline = split_thoughts(message.get("content") or "")[0]
    thoughts = [inline.removesuffix(CLOSING_TAG).removesuffix(HIDDEN_TAG).rpartition("<think>")[2]]
    thoughts += [message[key] for key in THOUGHT_KEYS if isinstance(message.get(key), str)]
    return [thought.strip() for thought in thoughts if thought.strip()]


def _called(message: Message) -> list[str]:
    """The names of the functions that a turn calls."""
    calls = message.get("tool_calls") or ()
    return [str(call.get("function", call).get("name")) for call in calls]


def _all_in(parts: Sequence[str], text: str) -> bool:
    return all(part in text for part in parts)


def _messages(part: Text | None) -> list[Message]:
    assert not isinstance(part, str), "the parts of a conversation are messages by now"
    return part or []
