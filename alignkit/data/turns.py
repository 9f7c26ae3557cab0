"""Which characters of a rendered conversation each assistant turn wrote.

Templates trim contents, drop old thoughts and end a turn differently in the middle of a conversation
and at its end, so a turn cannot be looked for by its content. Instead the conversation is rendered
once more with private characters around what each message says. Where these come out, and leave the
rest of the text as it was, is where the message stands.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, count
from operator import ne
from typing import Any

from alignkit.data.messages import Message
from alignkit.data.template import CLOSING_TAG, HIDDEN_TAG, ChatTemplate
from alignkit.data.verdicts import BadRow

Span = tuple[int, int]  # characters of a text, the end not included
Places = Mapping[int, Span]  # message -> what it says, as far as it was found

FIRST_MARK = 0xF0000  # of a private area: one character before and one behind each message
MOST_MARKED = 30_000  # messages that have marks of their own
SHORTEST_HEADER = 3  # characters by which the header of an opening turn is recognised


@dataclass
class Turns:
    """A conversation's text and what the assistant's trained turns wrote of it."""

    text: str = ""
    spans: list[Span] = field(default_factory=list)
    lost: int = 0  # trained turns that could not be found


@dataclass(frozen=True)
class Opening:
    """What a template writes behind the last message of a conversation."""

    closing: str  # where nothing follows
    prompt: str  # where the assistant is to write


@dataclass(frozen=True)
class Words:
    """What an assistant turn says, without the header before it and the ending behind it."""

    begin: int
    end: int
    missing: str  # the end of the generation prompt that this turn does not go on from


class TurnFinder:
    """Finds turns in the texts of one template. `special` are the texts of special tokens."""

    def __init__(self, template: ChatTemplate, special: Collection[str]) -> None:
        self.template = template
        self.usual_openings: dict[str, Opening | None] = {}
        self.stops: dict[str, str] = {}

        longest_first = sorted(filter(None, special), key=len, reverse=True)
        self.special = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def find(
        self,
        messages: list[Message],
        trained: Sequence[int],
        options: dict[str, Any],
        text: str,
        *,
        teach: bool,
    ) -> Turns:
        """The turns with the numbers `trained` in `text`, the rendered `messages`.

        With `teach` each of them gets the words that it has when it is the last turn: a template
        that drops the thoughts of earlier turns would otherwise leave nothing of them to train on.
        Without it the text stays as it is.
        """
        places = self._places(messages, options, text)
        turns = Turns()
        copied = 0  # characters of `text`

        for i in trained:
            here = self._words(messages, i, options, text, places)
            if here is None:
                turns.lost += 1
                continue

            words = text[here.begin : here.end]
            header = ""
            next_places = [places[k][0] for k in places if k > i]
            following = text[here.end : min(next_places, default=len(text))]
            ending = self._ending(following, following)
            if i + 1 < len(messages):
                as_last, places_as_last = self._as_last(messages[: i + 1], options, text, places)
                there = self._words(messages, i, options, as_last, places_as_last)
                ending = self._ending(as_last[there.end :] if there else None, following)
                if messages[i].get("tool_calls") and messages[i].get("content"):
                    alone = self._behind_calls_alone(messages[: i + 1], options)
                    ending = max(ending, self._ending(alone, following), key=len)
                if there and teach:
                    words = as_last[there.begin : there.end]
                    header = here.missing.removesuffix(there.missing)

            turns.text += text[copied : here.begin] + header
            begin = len(turns.text)
            turns.text += words + ending
            turns.spans.append((begin, len(turns.text)))
            copied = here.end + len(ending)

        turns.text += text[copied:]
        return turns

    def stop(self, message: Message, options: dict[str, Any], text: str) -> str:
        """What a model is to write behind `message`, the last of a conversation with `text`: nothing
        where the template ends the turn with a special token. Else it is the special token with
        which the next turn begins, because there a sampler has to stop.
        """
        if self.ends_with_special(text):
            return ""

        calls = {"tool_calls": message["tool_calls"]} if message.get("tool_calls") else {}
        role = "tool" if calls else "user"
        key = _key(role, options)
        if key not in self.stops:
            answered = [_says("user"), _says("assistant") | calls]
            try:
                before = self.template.text(answered, options)
                after = self.template.text([*answered, _says(role)], options)
            except BadRow:
                before = after = ""
            next_turn = after[len(before) :] if after.startswith(before) else ""
            first_token = re.match(rf"\s*{self.special.pattern}", next_turn)
            self.stops[key] = first_token[0] if first_token else ""
        return self.stops[key]

    def ends_with_special(self, text: str) -> bool:
        """Whether `text` ends with a special token, perhaps with white space behind it."""
        tokens = list(self.special.finditer(text))
        return bool(tokens) and not text[tokens[-1].end() :].strip()

    def _as_last(
        self, messages: list[Message], options: dict[str, Any], text: str, places: Places
    ) -> tuple[str, Places]:
        """The conversation as it is when `messages` are all of it: its text, and the places in it.
        `text` and `places` are those of the whole one, which mostly begins with it.
        """
        try:
            as_last = self.template.text(messages, options)
        except BadRow:
            return "", {}
        if text.startswith(as_last):
            return as_last, places
        return as_last, self._places(messages, options, as_last)

    def _behind_calls_alone(self, messages: list[Message], options: dict[str, Any]) -> str | None:
        """What ends the last of `messages`, a turn with tool calls, when no words stand beside them:
        a template that moves such words elsewhere may then show where the calls end.
        """
        alone = [*messages[:-1], messages[-1] | {"content": ""}]
        text, places = self._as_last(alone, options, "", {})
        words = self._words(alone, len(alone) - 1, options, text, places)
        return text[words.end :] if words else None

    def _words(
        self, messages: list[Message], i: int, options: dict[str, Any], text: str, places: Places
    ) -> Words | None:
        """What turn `i` says in `text`. It begins where the generation prompt ends, or where the
        turn stops following it; None where that cannot be found.
        """
        if i not in places:
            return None
        begin, end = places[i]
        previous = max((k for k in places if k < i), default=None)
        if previous is None:
            return self._opening_words(options, text, begin, end)

        previous_end = places[previous][1]
        for opening in self._openings(messages[:i], previous, options):
            length = common_prefix([text[previous_end:begin], opening.prompt])
            if length < common_prefix([opening.closing, opening.prompt]):
                continue
            missing = opening.prompt[length:]
            if opening.closing == opening.prompt:
                # Here the template prompts for nothing, as behind a tool's answer, but the header
                # of a turn may stand in the text all the same.
                header = self._header(options)
                shared = common_prefix([text[previous_end + length : begin], header])
                if shared >= SHORTEST_HEADER:
                    length += shared
                    missing = header[shared:]
            return Words(previous_end + length, end, missing)

        # Or the text before the turn changes with what follows, but not the header itself.
        header = self._header(options)
        if header and text[previous_end:begin].endswith(header):
            return Words(begin, end, "")
        return None

    def _opening_words(self, options: dict[str, Any], text: str, begin: int, end: int) -> Words:
        """The words of a turn that opens the conversation. Nobody wrote anything before it, so its
        header is looked for in the text: as much of the generation prompt as can be found.
        """
        header = self._header(options)
        for length in range(len(header), SHORTEST_HEADER - 1, -1):
            position = text.find(header[:length], 0, begin)
            if position >= 0:
                return Words(position + length, end, header[length:])
        return Words(begin, end, "")

    def _header(self, options: dict[str, Any]) -> str:
        """The generation prompt behind a user's message."""
        opening = self._usual_opening("user", options)
        if opening is None:
            return ""
        return opening.prompt[common_prefix([opening.closing, opening.prompt]) :]

    def _openings(
        self, messages: list[Message], previous: int, options: dict[str, Any]
    ) -> Iterator[Opening]:
        """What the template may write behind message `previous`, the last of `messages` that it
        writes at all: first the usual text, because it is mostly right and already known, then that
        of these very messages.
        """
        if previous == len(messages) - 1:
            usual = self._usual_opening(messages[previous]["role"], options)
            if usual:
                yield usual
        if own := self._opening(messages, previous, options):
            yield own

    def _usual_opening(self, role: str, options: dict[str, Any]) -> Opening | None:
        """What the template writes behind a short message of `role`."""
        key = _key(role, options)
        if key not in self.usual_openings:
            self.usual_openings[key] = self._opening([_says(role)], 0, options)
        return self.usual_openings[key]

    def _opening(
        self, messages: list[Message], previous: int, options: dict[str, Any]
    ) -> Opening | None:
        """What the template writes behind message `previous` of
        `messages`; None where it refuses them.
        """
        ends = []
        for prompt in (False, True):
            try:
                text = self.template.text(messages, options, prompt=prompt)
            except BadRow:
                return None
            places = self._places(messages, options, text, prompt=prompt)
            if previous not in places:
                return None
            ends.append(text[places[previous][1] :])
        return Opening(closing=ends[0], prompt=ends[1])

    def _places(
        self,
        messages: list[Message],
        options: dict[str, Any],
        text: str,
        *,
        prompt: bool = False,
    ) -> Places:
        """Where each message stands in `text`. Marks change what some templates write: then each
        message is tried alone, and left out where it still does.
        """
        numbers = range(min(len(messages), MOST_MARKED))
        places = self._marked_places(messages, numbers, options, text, prompt)
        for i in numbers:
            if i in places:
                continue
            places |= self._marked_places(messages, [i], options, text, prompt)

            # A template that leaves out tool calls may still write the content beside them.
            if i not in places and messages[i].get("tool_calls"):
                places |= self._marked_places(messages, [i], options, text, prompt, calls=False)
        return places

    def _marked_places(
        self,
        messages: list[Message],
        numbers: Collection[int],
        options: dict[str, Any],
        text: str,
        prompt: bool,
        *,
        calls: bool = True,
    ) -> dict[int, Span]:
        """The places of the messages `numbers`, all marked at once: empty where that changes the
        text. A turn with tool calls is marked at these, or with `calls=False` at its content.
        """
        marked = [
            _marked(message, i, calls=calls) if i in numbers else message
            for i, message in enumerate(messages)
        ]
        try:
            with_marks = self.template.text(marked, options, prompt=prompt)
        except BadRow:
            return {}

        # Where a message is written twice, its first place counts.
        begins: dict[int, int] = {}
        ends: dict[int, int] = {}
        pieces = MARK.split(with_marks)
        length = 0
        for piece, mark in zip(pieces[::2], [*pieces[1::2], ""]):
            length += len(piece)
            if mark:
                number, is_end = divmod(ord(mark) - FIRST_MARK, 2)
                (ends if is_end else begins).setdefault(number, length)

        if "".join(pieces[::2]) != text:
            return {}
        return {i: (begins[i], ends[i]) for i in begins if ends.get(i, -1) >= begins[i]}

    def _ending(self, as_last: str | None, following: str) -> str:
        """With how much of `following`, the text behind a turn's words, the turn ends. `as_last` is
        what follows them where the turn is the last; None if that is not known.

        The ending is what both have in common, token by token. It has a special token at its end:
        if that is not in common, it is the next one, with which the next turn may even begin.
        """
        if as_last is None:
            first_token = re.search(rf"{self.special.pattern}\s*", following)
            return following[: first_token.end()] if first_token else ""

        pieces = self.special.split(following)
        alone = self.special.split(as_last)
        shared = common_prefix([pieces, alone])
        ending = "".join(pieces[:shared])
        if following.startswith(as_last) and len(as_last) > len(ending):
            ending = as_last
        if not self.ends_with_special(ending):
            next_token = re.match(rf"\s*{self.special.pattern}", following[len(ending) :])
            ending += next_token[0] if next_token else ""
        return ending


MARK = re.compile(f"([{chr(FIRST_MARK)}-{chr(FIRST_MARK + 2 * MOST_MARKED - 1)}])")


def common_prefix(sequences: Sequence[Any]) -> int:
    """Length of the longest common prefix of texts, or of lists of token ids."""
    # The first and the last in lexical order differ no later than any other two.
    first = min(sequences)
    last = max(sequences)
    if last[: len(first)] == first:
        return len(first)
    return next(compress(count(), map(ne, first, last)))


def _says(role: str) -> Message:
    """A message of `role` that stands for any other."""
    return {"role": role, "content": "x"}


def _key(role: str, options: Mapping[str, Any]) -> str:
    return role + json.dumps(options, sort_keys=True, default=str)


def _marked(message: Message, number: int, *, calls: bool) -> Message:
    """`message` with marks around what it says: the names of its tool calls (if `calls`), else its
    content without the thoughts before it. White space at the ends stays outside, as templates trim
    it.
    """
    before = chr(FIRST_MARK + 2 * number)
    behind = chr(FIRST_MARK + 2 * number + 1)
    called = message.get("tool_calls")
    if called and calls:
        called = [*_renamed(called[:1], before, ""), *called[1:]]
        return message | {"tool_calls": [*called[:-1], *_renamed(called[-1:], "", behind)]}

    thoughts, answer = split_thoughts(message.get("content") or "")
    words = answer.strip()
    start = answer.find(words)
    marked = answer[:start] + before + words + behind + answer[start + len(words) :]
    return message | {"content": thoughts + marked}


def split_thoughts(content: str) -> tuple[str, str]:
    """What comes up to the end of the last thought in an answer, and what comes behind it."""
    tags = list(re.finditer(f"{CLOSING_TAG}|{HIDDEN_TAG}", content))
    end = tags[-1].end() if tags else 0
    return content[:end], content[end:]


def _renamed(calls: Sequence[Any], before: str, behind: str) -> list[Any]:
    """Tool calls whose functions have `before` and `behind` around their names."""
    renamed = []
    for call in calls:
        function = call.get("function", call)
        function = function | {"name": before + str(function.get("name")) + behind}
        renamed.append(call | {"function": function} if "function" in call else function)
    return renamed
