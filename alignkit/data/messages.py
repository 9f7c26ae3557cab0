"""What a row may hold where a prompt or a completion is expected: a text, or a list of messages."""

from collections.abc import Mapping
from typing import Any

from alignkit.data.verdicts import BadRow

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAPE = (
    'messages look like [{"role": "user", "content": "..."}, '
    '{"role": "assistant", "content": "..."}]'
)
Message = dict[str, Any]  # `role` and `content`, perhaps `tool_calls`, `name`, `weight`, ...
Text = str | list[Message]


def checked_text(value: object, column: str) -> Text:
    """`value` of `column` as a text or as checked messages. Raises BadRow."""
    if value is None:
        raise BadRow("null", f"{column} is null")
    if isinstance(value, list):
        return [_checked_message(message, column) for message in value]
    if isinstance(value, str):
        return checked_unicode(value, column)
    given = f"{type(value).__name__} ({str(value)[:40]})"
    raise BadRow("type", f"{column} is {given}, expected a text or a list of messages")


def checked_unicode(value: str, what: str) -> str:
    """`value` itself; raises BadRow where it cannot be encoded as UTF-8. `what` names it."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        character = f"U+{ord(value[error.start]):04X}"
        raise BadRow(
            "surrogate",
            f"{what} holds the lone surrogate {character} at character {error.start + 1}",
        ) from None
    return value


def check_ending(completion: Text, column: str) -> None:
    """Raise BadRow for a completion of messages that does not end with the assistant's."""
    if isinstance(completion, list) and completion and completion[-1]["role"] != "assistant":
        role = completion[-1]["role"]
        raise BadRow(
            "role", f"{column} ends with a {role} turn; it has to end with an assistant turn"
        )


def is_empty(completion: Text) -> bool:
    """Whether a completion says nothing: white space alone, no turn, or a last turn without content
    and tool calls.
    """
    if isinstance(completion, str):
        return not completion.strip()
    if not completion:
        return True
    last = completion[-1]
    return not last["content"].strip() and "tool_calls" not in last


def is_trained(message: Message) -> bool:
    """Whether an assistant's turn is learned from: the data may say no with `weight: 0` or
    `trainable: false`, of which checked messages keep `weight: 0`.
    """
    return message.get("weight") != 0


def _checked_message(message: object, column: str) -> Message:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        given = type(message).__name__
        if isinstance(message, Mapping):
            given = f"the keys {', '.join(map(str, message))}"
        raise BadRow("messages", f"{column} is a list with {given}; {SHAPE}")

    # Arrow fills the keys that a message does not have with null, so null means absent.
    given_keys = {key: value for key, value in message.items() if value is not None}
    role = given_keys.get("role")
    if role not in ROLES:
        raise BadRow("role", f"{column} has the role {role!r}; roles are {', '.join(ROLES)}")

    # Content in parts, [{"type": "text", "text": "..."}], is joined to one text.
    content = given_keys.get("content")
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)

    if content is None and "tool_calls" not in given_keys:
        raise BadRow("null", f"{column} has a message whose content is null")
    if not isinstance(content, str | None):
        given = type(content).__name__
        raise BadRow("type", f"{column} has a message whose content is {given}, expected a text")

    marks = {name: given_keys.pop(name) for name in ("weight", "trainable") if name in given_keys}
    for name, mark in marks.items():
        if mark not in (0, 1):  # bools and whole floats are equal to these
            raise BadRow("type", f"{column} has a message of {name} {mark!r}; it is 0 or 1")
    if role == "assistant" and not all(marks.values()):
        given_keys["weight"] = 0
    return given_keys | {"content": checked_unicode(content or "", column)}


def _is_text_part(part: object) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("text"), str)
