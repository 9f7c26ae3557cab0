"""From a row to a checked example: a prompt and its completions, each text or a list of messages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isfinite
from typing import Any

from alignkit.data.dialects import translated
from alignkit.data.dialogues import shared_turns, split_turns, without_prompt
from alignkit.data.file_formats import Row
from alignkit.data.formats import COLUMNS, SYNONYMS
from alignkit.data.messages import SHAPE, Text, check_ending, checked_text, is_empty, is_trained
from alignkit.data.verdicts import BadRow

SYSTEM_ROLES = ("system", "developer")
# What rewards are called with beside the columns of the rows.
RESERVED_COLUMNS = ("self", "prompts", "completions", "completion_ids", "trainer_state")


# What data sets for models that see or hear call what stands beside the text.
MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")

_AS_TEXT = json.JSONEncoder(sort_keys=True, default=str)


@dataclass(frozen=True)
class Example:
    """A checked row.

    `prompt` is None where it is implicit: the common beginning of the completions.
    """

    number: int  # of the row
    uid: str
    prompt: Text | None
    completions: list[Text]
    label: bool | None = None
    margin: float | None = None  # by how much the chosen completion's reward is to lead
    columns: Mapping[str, Any] = field(default_factory=dict)  # the row's other ones, for rewards
    template: Mapping[str, Any] = field(default_factory=dict)  # options of the chat template
    verdicts: Sequence[str] = ()  # what was changed in the row to understand it
    has_place: bool = False  # `uid` is file and line, as the rows come from several files

    @cached_property
    def chat(self) -> bool:
        """Whether it goes through the chat template."""
        return any(isinstance(part, list) for part in (self.prompt, *self.completions))

    def key(self, *, swapped: bool = False) -> str:
        """Equal for examples of equal content; `swapped` is the content with chosen and rejected
        exchanged, or with the other label.
        """
        completions = self.completions[::-1] if swapped else self.completions
        label = not self.label if swapped and self.label is not None else self.label
        return _AS_TEXT.encode([self.prompt, completions, label])


def make_example(
    row: Row, format: str, family: str | None, source: str, *, system_turn: bool = False
) -> Example:
    """The example in `row` of `source` (its short name), whose columns have `format`.

    With `system_turn` the column `system` is the first turn of a conversation, without it the first
    paragraph of a text. Raises BadRow with the verdict.
    """
    if row.values is None:
        raise BadRow(row.verdict, row.problem)

    values, verdicts = translated(row.values)
    for column in COLUMNS[format]:
        if column not in values:
            there = ", ".join(map(str, values)) or "no columns"
            raise BadRow("missing", f"no `{column}` among {there}")

    texts = {
        column: checked_text(values[column], column)
        for column in COLUMNS[format]
        if column not in ("label", "ranking")
    }
    ranking = _ranking(values["ranking"]) if format == "ranking" else []
    prompt, completions = _prompt_and_completions(texts, ranking, format, family)
    has_place = format != "text" or isinstance(prompt, list)
    if "system" in values and prompt is not None and has_place:
        prompt = _with_system(prompt, values["system"], as_turn=system_turn)
    elif str(values.get("system") or "").strip():
        verdicts.append("system_unused")

    if any(values.get(name) for name in MEDIA_COLUMNS):
        verdicts.append("media_unread")
    if format == "implicit_pair" and _has_unread_prompt(values):
        verdicts.append("prompt_unread")

    columns = {key: value for key, value in values.items() if key not in texts}
    if format == "prompt" and any(_is_reserved(key) for key in columns):
        columns = {key: value for key, value in columns.items() if not _is_reserved(key)}
        verdicts.append("reserved_column")

    example = Example(
        number=row.number,
        uid=row.place or f"{source}:{row.number}",
        prompt=prompt,
        completions=completions,
        label=label_of(values["label"]) if format == "labelled" else None,
        margin=_margin(values, format) if family == "ranked" else None,
        columns=columns,
        template=_template_options(values),
        verdicts=verdicts,
        has_place=bool(row.place),
    )
    return _all_messages(example) if example.chat else example


def _margin(values: Mapping[str, Any], format: str) -> float | None:
    """The row's `margin`, as TRL's reward trainer reads it. Raises BadRow for what is no number, and
    beside a ranking.
    """
    margin = values.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not isfinite(margin):
        raise BadRow("type", f"margin is {margin!r}; a margin is a finite number")
    if format == "ranking":
        raise BadRow("type", "a margin goes with chosen and rejected, not with a ranking")
    return float(margin)


def _prompt_and_completions(
    texts: Mapping[str, Text], ranking: list[Text], format: str, family: str | None
) -> tuple[Text | None, list[Text]]:
    """Prompt and completions of a row whose columns are checked one by one. Raises BadRow for a row
    that has nothing to learn from.
    """
    if format == "prompt":
        _check_prompt_ending(texts["prompt"])
        return texts["prompt"], []  # the completions will be sampled
    if format in ("messages", "text"):
        return _single_text(texts[format], format)

    completions = ranking or _completions(texts, format, family)
    if format == "implicit_pair":
        chosen, rejected = completions
        if not isinstance(chosen, list) or not isinstance(rejected, list):
            return None, completions
        shared = shared_turns([chosen, rejected])
        prompt: Text = chosen[:shared]
        completions = [chosen[shared:], rejected[shared:]]
    else:
        prompt, rest = without_prompt(texts["prompt"], completions)
        if rest is completions:  # the prompt column is all of the prompt
            _check_prompt_ending(prompt)
        completions = rest

    if family == "sequence":  # sft on pairs learns the chosen completions
        completions = completions[:1]
    for completion in completions:
        if isinstance(completion, list) and not _teaches(completion):
            raise BadRow("untrained", "every assistant turn of a completion")
    return prompt, completions


def _single_text(text: Text, column: str) -> tuple[Text, list[Text]]:
    """Prompt and completion of a dialogue, or of a text that is trained as a whole."""
    if isinstance(text, list):
        prompt, completion = split_turns(text)
        return prompt, [completion]
    if column == "messages":
        raise BadRow("type", f"messages is a text; {SHAPE}")
    if is_empty(text):
        raise BadRow("empty", column)
    return "", [text]


def _completions(texts: Mapping[str, Text], format: str, family: str | None) -> list[Text]:
    """The completions of a pair, or the only one. Raises BadRow for those that teach nothing."""
    if format in ("completion", "labelled"):
        completion = texts["completion"]
        check_ending(completion, "completion")
        if is_empty(completion):
            raise BadRow("empty", "completion")
        return [completion]

    chosen = texts["chosen"]
    rejected = texts["rejected"]
    if format == "pair" and family == "sequence":
        check_ending(chosen, "chosen")
        if is_empty(chosen):
            raise BadRow("empty", "chosen")
        # The other dialogue shows where the prompt ends; an answer shows nothing.
        whole = isinstance(chosen, list) and isinstance(rejected, list) and not is_empty(rejected)
        return [chosen, rejected] if whole else [chosen]
    _check_pair(chosen, rejected)
    return [chosen, rejected]


def _teaches(turns: Sequence[Mapping[str, Any]]) -> bool:
    return any(turn["role"] == "assistant" and is_trained(dict(turn)) for turn in turns)


def _is_reserved(column: object) -> bool:
    """Whether a reward could not be called with a column of this name."""
    return column in RESERVED_COLUMNS or not isinstance(column, str)


def _has_unread_prompt(values: Mapping[str, Any]) -> bool:
    """Whether a column that is named as prompts are says what the two completions do not."""
    pair = [str(values["chosen"]), str(values["rejected"])]
    named = (values.get(name) for name in (*SYNONYMS["prompt"], "messages"))
    prompts = [text for text in named if text and isinstance(text, str | list)]
    return any(
        text.strip() not in completion
        if isinstance(text, str)
        else isinstance(values["chosen"], str)
        for text in prompts
        for completion in pair
    )


def _with_system(prompt: Text, system: object, *, as_turn: bool) -> Text:
    """The prompt behind what the column `system` says. Raises BadRow where the two disagree."""
    text = checked_text(system, "system") if system is not None else ""
    if not isinstance(text, str):
        raise BadRow("type", "system is a list, expected a text")
    if isinstance(prompt, str) and not as_turn:
        return f"{text}\n\n{prompt}" if text.strip() else prompt

    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not text.strip():
        return prompt
    own = [message["content"] for message in prompt[:1] if message["role"] in SYSTEM_ROLES]
    if not own:
        return [{"role": "system", "content": text}, *prompt]
    if own[0].split() != text.split():
        raise BadRow(
            "contradicting_prompt", "the column system and the prompt's system turn differ"
        )
    return prompt


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


def _all_messages(example: Example) -> Example:
    """Text beside messages becomes a turn: a prompt the user's, a completion the assistant's."""
    prompt = example.prompt
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]

    completions: list[Text] = [
        [{"role": "assistant", "content": text}] if isinstance(text, str) else text
        for text in example.completions
    ]
    return replace(example, prompt=prompt, completions=completions)


def _template_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the columns `tools` and `chat_template_kwargs` hand to the chat template."""
    options = values.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping):
        given = type(options).__name__
        raise BadRow("type", f"chat_template_kwargs is {given}, expected an object")
    tools = values.get("tools")
    if isinstance(tools, str) and tools.strip():
        raise BadRow("type", "tools is a text that is not JSON, expected a list")
    if tools and not isinstance(tools, list):
        raise BadRow("type", f"tools is {type(tools).__name__}, expected a list")
    return dict(options) | ({"tools": tools} if tools else {})


def label_of(value: object) -> bool:
    """A label as true or false. Raises BadRow for what is neither."""
    words = {"true": True, "false": False, "1": True, "0": False}
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    raise BadRow("null" if value is None else "type", f"label is {value!r}, expected true or false")
