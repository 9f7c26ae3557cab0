"""From a row to a checked example: a prompt and its completions, each text or a list of messages."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from alignkit.data.formats import COLUMNS
from alignkit.data.messages import SHAPE, Message, Text, check_ending, checked_text, is_empty
from alignkit.data.read import Row
from alignkit.data.verdicts import BadRow


@dataclass(frozen=True)
class Example:
    """A checked row. `prompt` is None where it is implicit: the common beginning of the
    completions.
    """

    number: int  # of the row
    uid: str
    prompt: Text | None
    completions: list[Text]
    label: bool | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)  # the row's other ones, for rewards
    template: Mapping[str, Any] = field(default_factory=dict)  # options of the chat template

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


def make_example(row: Row, format: str, family: str | None, source: str) -> Example:
    """The example in `row` of `source` (its short name), whose columns have `format`. Raises BadRow
    with the verdict.
    """
    if row.values is None:
        raise BadRow("unreadable", row.problem)

    values = row.values
    for column in COLUMNS[format]:
        if column not in values:
            there = ", ".join(map(str, values)) or "no columns"
            raise BadRow("missing", f"no `{column}` among {there}")

    texts = {
        column: checked_text(values[column], column)
        for column in COLUMNS[format]
        if column not in ("label", "ranking")
    }
    if format == "ranking":
        prompt: Text | None = texts["prompt"]
        completions = _ranking(values["ranking"])
    else:
        prompt, completions = _prompt_and_completions(texts, format, family)
    if format != "implicit_pair":
        _check_prompt_ending(prompt)

    example = Example(
        number=row.number,
        uid=f"{source}:{row.number}",
        prompt=prompt,
        completions=completions,
        label=_label(values["label"]) if format == "labelled" else None,
        columns={key: value for key, value in values.items() if key not in texts},
        template=_template_options(values),
    )
    return _all_messages(example) if example.chat else example


def _prompt_and_completions(
    texts: Mapping[str, Text], format: str, family: str | None
) -> tuple[Text | None, list[Text]]:
    """Prompt and completions of a row whose columns are checked one by one. Raises BadRow for a row
    that has nothing to learn from.
    """
    if format == "pair" and family == "sequence":  # sft on pairs learns the chosen completions
        format = "completion"
        texts = {"prompt": texts["prompt"], "completion": texts["chosen"]}

    if format in ("pair", "implicit_pair"):
        chosen = texts["chosen"]
        rejected = texts["rejected"]
        _check_pair(chosen, rejected)
        if format == "implicit_pair" and isinstance(chosen, list) and isinstance(rejected, list):
            return _split_dialogues(chosen, rejected, family)
        return texts.get("prompt"), [chosen, rejected]

    if format in ("completion", "labelled"):
        completion = texts["completion"]
        check_ending(completion, "completion")
        if is_empty(completion):
            raise BadRow("empty", "completion")
        return texts["prompt"], [completion]

    if format == "messages":
        return _split_turns(texts["messages"])

    if format == "text":
        text = texts["text"]
        if isinstance(text, list):
            return _split_turns(text)
        if is_empty(text):
            raise BadRow("empty", "text")
        return "", [text]

    return texts["prompt"], []  # format `prompt`: the completions will be sampled


def _check_pair(chosen: Text, rejected: Text) -> None:
    check_ending(chosen, "chosen")
    check_ending(rejected, "rejected")
    if is_empty(chosen) and is_empty(rejected):
        raise BadRow("both_empty")
    if is_empty(chosen):
        raise BadRow("empty", "chosen")
    if is_empty(rejected):
        raise BadRow("empty", "rejected")
    if chosen == rejected:
        raise BadRow("identical")


def _check_prompt_ending(prompt: Text | None) -> None:
    if isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
        raise BadRow(
            "role",
            "the prompt ends with an assistant turn; it has to end with the user's (or a tool's)",
        )


def _ranking(value: object) -> list[Text]:
    """Two or more completions, best first."""
    if not isinstance(value, list) or len(value) < 2:
        given = f"a list of {len(value)}" if isinstance(value, list) else type(value).__name__
        raise BadRow(
            "null" if value is None else "type",
            f"ranking is {given}, expected two or more completions, best first",
        )

    completions = [checked_text(completion, "ranking") for completion in value]
    for completion in completions:
        check_ending(completion, "ranking")
        if is_empty(completion):
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
    """A dialogue: the prompt ends before the first assistant turn. The rest up to the last
    assistant turn is one completion, of which only the assistant's turns are trained.
    """
    if isinstance(messages, str):
        raise BadRow("type", f"messages is a text; {SHAPE}")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise BadRow("role", "no assistant turn to learn from")
    return messages[: turns[0]], [messages[turns[0] : turns[-1] + 1]]


def _all_messages(example: Example) -> Example:
    """Text beside messages becomes a turn: a prompt the user's, a completion the assistant's. A
    completion that repeats the prompt loses it.
    """
    prompt = example.prompt
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]

    completions: list[Text] = []
    for completion in example.completions:
        if isinstance(completion, str):
            turns = [{"role": "assistant", "content": completion}]
        else:
            turns = completion
        if prompt and len(turns) > len(prompt) and turns[: len(prompt)] == prompt:
            turns = turns[len(prompt) :]
        completions.append(turns)
    return replace(example, prompt=prompt, completions=completions)


def _template_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the columns `tools` and `chat_template_kwargs` hand to the chat template."""
    options = values.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping):
        given = type(options).__name__
        raise BadRow("type", f"chat_template_kwargs is {given}, expected an object")
    tools = values.get("tools")
    return dict(options) | ({"tools": tools} if tools else {})


def _label(value: object) -> bool:
    words = {"true": True, "false": False, "1": True, "0": False}
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    raise BadRow("null" if value is None else "type", f"label is {value!r}, expected true or false")
