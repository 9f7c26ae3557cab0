"""Other ways of writing the same row: message lists and tools as JSON text, ShareGPT's `from` and
`value`, tool calls without content, and the nulls that Arrow adds. All become what `messages.py`
checks.
"""

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from alignkit.data.verdicts import BadRow

MESSAGE_COLUMNS = ("prompt", "chosen", "rejected", "completion", "messages", "text")
# ShareGPT's roles -> ours.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
# The beginning of a list of messages that a CSV file holds as JSON, or as Python prints it.
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*(["'])(role|content|from|value)\1\s*:""")


def translated(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A row in the form that we check, and the verdicts that it gets for what was changed. Raises
    BadRow for text that looks like messages or tools but cannot be read as such.
    """
    row = dict(values)
    verdicts: dict[str, None] = {}  # an ordered set

    for column in MESSAGE_COLUMNS:
        if isinstance(row.get(column), str | list | Mapping):
            row[column] = _text_or_messages(row[column], column, verdicts)
    if isinstance(row.get("ranking"), str) and row["ranking"].lstrip().startswith("["):
        row["ranking"] = _parsed_list(row["ranking"], "ranking")
    if isinstance(row.get("ranking"), list):
        row["ranking"] = [
            _text_or_messages(completion, "ranking", verdicts) for completion in row["ranking"]
        ]

    for column in ("tools", "chat_template_kwargs"):
        value = row.get(column)
        if isinstance(value, str):
            value = _parsed_or_same(value)
        if value is not None:
            row[column] = _without_nulls(value, verdicts)
    return row, list(verdicts)


def _text_or_messages(value: Any, column: str, verdicts: dict[str, None]) -> Any:
    """`value` with its messages in our form; whatever is neither text nor messages stays."""
    if isinstance(value, str) and _MESSAGES_AS_TEXT.match(value):
        messages = _parsed_messages(value, column)
        if messages is None:
            return value
        verdicts["messages_as_text"] = None
        value = messages

    if isinstance(value, Mapping) and ({"role", "from"} & set(value)):
        value = [value]  # the only message of a list
    if not isinstance(value, list):
        return value
    return [
        _message(message, column, verdicts) if isinstance(message, Mapping) else message
        for message in value
    ]


def _parsed_messages(text: str, column: str) -> list[Any] | None:
    """The messages that `text` writes down; None where it is a list of other things."""
    messages = _parsed_list(text, column)
    keys = [set(message) if isinstance(message, Mapping) else set() for message in messages]
    if all({"role", "content"} <= k or {"from", "value"} <= k or "tool_calls" in k for k in keys):
        return messages
    return None


def _parsed_list(text: str, column: str) -> list[Any]:
    """A list written as JSON, or as Python prints it, which is what pandas writes to CSV."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            raise BadRow(
                "messages",
                f"{column} looks like a list written as text, but it is not JSON ({error}); "
                "write the rows as JSON lines",
            ) from None
    if not isinstance(value, list):
        raise BadRow("type", f"{column} is {type(value).__name__} as text, expected a list")
    return value


def _message(message: Mapping[Any, Any], column: str, verdicts: dict[str, None]) -> dict[Any, Any]:
    """One message in our form, as far as it can be understood; checks come later."""
    # Arrow fills the keys that a message does not have with null, so null means absent.
    given = {key: value for key, value in message.items() if value is not None}
    if "role" not in given and {"from", "value"} <= set(given):
        given = _from_sharegpt(given, column)

    calls = given.get("tool_calls")
    if isinstance(calls, str):
        calls = _from_json(calls, f"{column}: tool_calls")
    if calls:
        given["tool_calls"] = _without_nulls(calls, verdicts)
        given.setdefault("content", "")
    elif "content" in given:
        given.pop("tool_calls", None)

    # What is null stays where a check has to see it.
    return {key: None for key in ("role", "content") if key in message} | given


def _from_sharegpt(given: Mapping[Any, Any], column: str) -> dict[Any, Any]:
    others = {key: value for key, value in given.items() if key not in ("from", "value")}
    sender = given["from"]
    if sender != "function_call":
        role = ROLES.get(sender, sender) if isinstance(sender, str) else sender
        return {"role": role, "content": given["value"], **others}

    call = given["value"]
    if isinstance(call, str):
        call = _from_json(call, f"{column}: function_call")
    calls = call if isinstance(call, list) else [call]
    wrapped = [{"type": "function", "function": function} for function in calls]
    return {"role": "assistant", "content": "", "tool_calls": wrapped, **others}


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("type", f"{what} is a text that is not JSON ({error})") from None


def _parsed_or_same(text: str) -> Any:
    """The value that `text` holds as JSON, else the text, which a later check refuses."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _without_nulls(value: Any, verdicts: dict[str, None]) -> Any:
    """`value` without the keys, at any depth, that hold null:
    Arrow gives every row the keys of all the others.
    """
    if isinstance(value, list):
        return [_without_nulls(item, verdicts) for item in value]
    if not isinstance(value, Mapping):
        return value

    given = {key: item for key, item in value.items() if item is not None}
    if len(given) < len(value):
        verdicts["nulls_dropped"] = None
    return {key: _without_nulls(item, verdicts) for key, item in given.items()}
