"""From a raw row to a checked example: a prompt and its completions, each a text or a list of
messages.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignkit.data.formats import NEEDS
from alignkit.data.read import Row

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAPE = 'messages look like [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
Message = dict[str, Any]
Text = str | list[Message]


class BadRow(Exception):
    """A row that gets `verdict` and leaves the data."""

    def __init__(self, verdict: str, detail: str = "") -> None:
        super().__init__(detail)
        self.verdict = verdict
        self.detail = detail


@dataclass(frozen=True)
class Example:
    """A checked row. `prompt` is None where it is implicit: the common beginning of the
    completions.
    """

    number: int
    uid: str
    prompt: Text | None
    completions: list[Text]
    label: bool | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)  # what is not ours: for rewards
    template: Mapping[str, Any] = field(default_factory=dict)  # `tools` and `chat_template_kwargs`

    @property
    def chat(self) -> bool:
        """Whether it goes through the chat template."""
        return any(isinstance(part, list) for part in (self.prompt, *self.completions))

    def key(self, *, swapped: bool = False) -> str:
        """Equal for examples of equal content; `swapped` is the content with chosen and rejected
        exchanged.
        """
        completions = self.completions[::-1] if swapped else self.completions
        return json.dumps([self.prompt, completions, self.label], sort_keys=True, default=str)


def example(row: Row, format: str, family: str | None, name: str) -> Example:
    """The example in `row` of a source called `name`. Raises BadRow with the verdict."""
    if row.values is None:
        raise BadRow("unreadable", row.problem)
    values = row.values
    needs = NEEDS[format]
    for column in needs:
        if column not in values:
            raise BadRow(
                "missing", f"no `{column}` among {', '.join(map(str, values)) or 'no columns'}"
            )
    texts = {
        column: _text(values[column], column)
        for column in needs
        if column not in ("label", "ranking")
    }
    if format == "ranking":
        prompt = texts["prompt"]
        completions = _ranking(values["ranking"])
    else:
        prompt, completions = _parts(texts, format, family)
    if (
        format != "implicit_pair"
        and isinstance(prompt, list)
        and prompt
        and prompt[-1]["role"] == "assistant"
    ):
        raise BadRow(
            "role",
            "the prompt ends with an assistant turn; it has to end with the user's (or a tool's)",
        )
    label = _label(values["label"]) if format == "labelled" else None
    columns = {key: value for key, value in values.items() if key not in texts}
    made = Example(
        row.number,
        f"{name}:{row.number}",
        prompt,
        completions,
        label,
        columns,
        _template_options(values),
    )
    return _as_chat(made) if made.chat else made


def _parts(
    texts: Mapping[str, Text], format: str, family: str | None
) -> tuple[Text | None, list[Text]]:
    """Prompt and completions of a row whose columns are checked one by one; degenerate rows raise."""
    if format == "pair" and family == "sequence":  # sft on pairs learns the chosen completions
        format = "completion"
        texts = {"prompt": texts["prompt"], "completion": texts["chosen"]}
    if format in ("pair", "implicit_pair"):
        chosen = texts["chosen"]
        rejected = texts["rejected"]
        for completion, column in ((chosen, "chosen"), (rejected, "rejected")):
            _check_ending(completion, column)
        if not _filled(chosen) and not _filled(rejected):
            raise BadRow("both_empty")
        if not _filled(chosen) or not _filled(rejected):
            raise BadRow("empty", "chosen" if not _filled(chosen) else "rejected")
        if chosen == rejected:
            raise BadRow("identical")
        if format == "implicit_pair" and isinstance(chosen, list) and isinstance(rejected, list):
            return _split_dialogues(chosen, rejected, family)
        return texts.get("prompt"), [chosen, rejected]
    if format in ("completion", "labelled"):
        _check_ending(texts["completion"], "completion")
        if not _filled(texts["completion"]):
            raise BadRow("empty", "completion")
        return texts["prompt"], [texts["completion"]]
    if format == "messages":
        return _split_turns(texts["messages"])
    if format == "text":
        if isinstance(texts["text"], list):
            return _split_turns(texts["text"])
        if not _filled(texts["text"]):
            raise BadRow("empty", "text")
        return "", [texts["text"]]
    return texts["prompt"], []


def _ranking(value: object) -> list[Text]:
    """Two or more completions, best first."""
    if not isinstance(value, list) or len(value) < 2:
        given = f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__
        raise BadRow(
            "null" if value is None else "type",
            f"ranking is {given}, expected two or more completions, best first",
        )
    completions = [_text(completion, "ranking") for completion in value]
    for completion in completions:
        _check_ending(completion, "ranking")
        if not _filled(completion):
            raise BadRow("empty", "ranking")
    if any(completion in completions[:i] for i, completion in enumerate(completions)):
        raise BadRow("identical", "a completion stands in the ranking twice")
    return completions


def _split_dialogues(
    chosen: list[Message], rejected: list[Message], family: str | None
) -> tuple[Text, list[Text]]:
    """An implicit prompt in messages is the turns that both dialogues begin with."""
    limit = min(len(chosen), len(rejected)) - 1  # each keeps at least its last turn
    shared = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    completions: list[Text] = [chosen[shared:], rejected[shared:]]
    return chosen[:shared], completions[:1] if family == "sequence" else completions


def _split_turns(messages: Text) -> tuple[Text, list[Text]]:
    """A dialogue: the prompt ends before the first assistant turn, the rest is one completion with
    holes in its mask.
    """
    if isinstance(messages, str):
        raise BadRow("type", f"messages is a text; {SHAPE}")
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None:
        raise BadRow("role", "no assistant turn to learn from")
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:first], [messages[first : last + 1]]


def _as_chat(made: Example) -> Example:
    """Text beside messages becomes a turn: a prompt the user's, a completion the assistant's; a
    repeated prompt is cut.
    """
    prompt = made.prompt
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    completions: list[Text] = []
    for completion in made.completions:
        turns = (
            [{"role": "assistant", "content": completion}]
            if isinstance(completion, str)
            else completion
        )
        if prompt and len(turns) > len(prompt) and turns[: len(prompt)] == prompt:
            turns = turns[len(prompt) :]
        completions.append(turns)
    return Example(
        made.number, made.uid, prompt, completions, made.label, made.columns, made.template
    )


def _text(value: object, column: str) -> Text:
    if value is None:
        raise BadRow("null", f"{column} is null")
    if isinstance(value, list):
        return [_message(message, column) for message in value]
    if not isinstance(value, str):
        raise BadRow(
            "type",
            f"{column} is {type(value).__name__} ({str(value)[:40]}), expected a text or a list of messages",
        )
    return check_unicode(value, column)


def check_unicode(value: str, column: str) -> str:
    """`value` itself; BadRow if it cannot be encoded."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        character = f"U+{ord(value[error.start]):04X}"
        raise BadRow(
            "surrogate",
            f"{column} holds the lone surrogate {character} at character {error.start + 1}",
        ) from None
    return value


def _message(message: object, column: str) -> Message:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        found = (
            f"the keys {', '.join(map(str, message))}"
            if isinstance(message, Mapping)
            else type(message).__name__
        )
        raise BadRow("messages", f"{column} is a list with {found}; {SHAPE}")
    # Arrow fills absent keys with null
    made = {key: value for key, value in message.items() if value is not None}
    if made.get("role") not in ROLES:
        raise BadRow(
            "role", f"{column} has the role {message['role']!r}; roles are {', '.join(ROLES)}"
        )
    content = made.get("content")
    if isinstance(content, list) and all(
        isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content
    ):
        content = "".join(part["text"] for part in content)
    if content is None and "tool_calls" not in made:
        raise BadRow("null", f"{column} has a message whose content is null")
    if not isinstance(content, str | None):
        raise BadRow(
            "type",
            f"{column} has a message whose content is {type(content).__name__}, expected a text",
        )
    return made | {"content": check_unicode(content or "", column)}


def _check_ending(completion: Text, column: str) -> None:
    if isinstance(completion, list) and completion and completion[-1]["role"] != "assistant":
        raise BadRow(
            "role",
            f"{column} ends with a {completion[-1]['role']} turn; it has to end with an assistant turn",
        )


def _filled(completion: Text) -> bool:
    if isinstance(completion, str):
        return bool(completion.strip())
    return bool(completion) and bool(
        completion[-1]["content"].strip() or "tool_calls" in completion[-1]
    )


def _template_options(values: Mapping[str, Any]) -> dict[str, Any]:
    options = values.get("chat_template_kwargs") or {}
    tools = values.get("tools")
    if not isinstance(options, Mapping):
        raise BadRow(
            "type", f"chat_template_kwargs is {type(options).__name__}, expected an object"
        )
    return dict(options) | ({"tools": tools} if tools else {})


def _label(value: object) -> bool:
    words = {"true": True, "false": False, "1": True, "0": False}
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    raise BadRow("null" if value is None else "type", f"label is {value!r}, expected true or false")
