"""One row in one chat template, as TRL and as alignkit prepare it, and what its text is made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import template_world as world

from alignkit.data import DataConfig, load_bundles
from alignkit.data.report import Report
from alignkit.errors import DataError


@dataclass(frozen=True)
class Side:
    """One row as a model sees it."""

    ids: list[int]
    mask: list[bool]

    def trained(self) -> list[int]:
        return [i for i, on in enumerate(self.mask) if on and i]  # nothing predicts the first


@dataclass
class Comparison:
    """One row in one template: both sides (two for a pair), or the errors."""

    kind: str
    name: str
    case: str
    row: dict[str, Any]
    tokenizer: Any
    theirs: list[Side] = field(default_factory=list)
    ours: list[Side] = field(default_factory=list)
    their_error: Exception | None = None
    our_error: Exception | None = None
    has_lost_turns: bool = False  # as alignkit's report says
    says_words_dropped: bool = False

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids))

    def every(self, check: Callable[[Side, Side], bool]) -> bool:
        return all(check(theirs, ours) for theirs, ours in zip(self.theirs, self.ours))


def prepare_both(kind: str, name: str, case: str, row: dict[str, Any], tokenizer: Any):
    row = world.filled(row, tokenizer)
    compared = Comparison(kind, name, case, row, tokenizer)
    try:
        compared.theirs = theirs_of(kind, row, tokenizer)
    except Exception as error:  # TRL lets through whatever a template raises
        compared.their_error = error
    try:
        compared.ours, report = ours_of(kind, row, tokenizer)
        compared.has_lost_turns = report.count("untrained_turn") > 0
        compared.says_words_dropped = report.count("words_dropped") > 0
    except DataError as error:
        compared.our_error = error
    return compared


def theirs_of(kind: str, row: dict[str, Any], tokenizer: Any) -> list[Side]:
    if tokenizer.name_or_path.startswith(world.VISION_ONLY):
        row = world.in_parts(row)
    if kind == "demonstrations":
        return [Side(*world.trl_demonstration(row, tokenizer))]
    prompt, completions = world.trl_pair(row, tokenizer)
    return [Side(prompt + c, [False] * len(prompt) + [True] * len(c)) for c in completions]


def ours_of(kind: str, row: dict[str, Any], tokenizer: Any) -> tuple[list[Side], Report]:
    family = "sequence" if kind == "demonstrations" else "pair"
    config = DataConfig(max_length=8192)
    (bundle,), report = load_bundles(config, family, tokenizer, source=[row])
    prompt = bundle.prompt.tolist()
    sides = [
        Side(prompt + ids.tolist(), [False] * len(prompt) + mask.tolist())
        for ids, mask in zip(bundle.completions, bundle.masks)
    ]
    return sides, report


def equal(theirs: Side, ours: Side) -> bool:
    """Equal up to turns behind the last trained token, which have no effect."""
    same_ids = ours.ids == theirs.ids[: len(ours.ids)]
    return same_ids and ours.trained() == theirs.trained()


def runs_of(theirs: Side, ours: Side) -> list[list[int]]:
    """The stretches of tokens that only TRL trains."""
    extra = set(theirs.trained()) - set(ours.trained())
    runs: list[list[int]] = []
    for i in sorted(extra):
        if i - 1 in extra:
            runs[-1].append(theirs.ids[i])
        else:
            runs.append([theirs.ids[i]])
    return runs


def completion_messages(compared: Comparison) -> list[dict[str, Any]]:
    columns = ("messages", "completion", "chosen", "rejected")
    parts = [compared.row[column] for column in columns if column in compared.row]
    return [message for part in parts if isinstance(part, list) for message in part]


def said_by(message: dict[str, Any]) -> list[str]:
    """What the assistant thinks and says in a message, in parts that every template keeps whole."""
    if message["role"] != "assistant":
        return []
    thought, _, answer = (message["content"] or "").rpartition("</think>")
    parts = [thought.removeprefix("<think>"), answer, message.get("reasoning_content", "")]
    return [part.strip() for part in parts if part.strip()]


def generation_prompts(compared: Comparison) -> list[str]:
    """What the template writes between the last message and the assistant's words."""
    conversations = [[world.user("QQQ")]]
    for arguments in ({"a": 1}, '{"a": 1}'):
        (call,) = world.calls(1, 2)
        call["function"]["arguments"] = arguments
        called = world.assistant("", tool_calls=[call])
        conversations.append([world.user("Q"), called, world.result("QQQ")])

    prompts = []
    for messages in conversations:
        try:
            text = compared.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # a template without tools, or with arguments in the other form
            continue
        prompts.append(text.rpartition("QQQ")[2])
    return prompts
