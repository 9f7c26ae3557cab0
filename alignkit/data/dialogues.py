"""Where the prompt of a conversation ends, for rows whose completions hold the whole of it."""

from collections.abc import Sequence

from alignkit.data.messages import Message, Text, is_trained
from alignkit.data.verdicts import BadRow

_OPENING_ROLES = ("system", "developer", "user")
_COMPARED = ("tool_calls", "reasoning_content", "thinking")  # beside role and content


def without_prompt(prompt: Text, completions: list[Text]) -> tuple[Text, list[Text]]:
    """Prompt and completions, nothing said twice, where completions may be whole dialogues.

    The turns that all dialogues share are the prompt, shared answers of the assistant included. A
    single dialogue is cut behind the turn that `prompt` names. Raises BadRow where the dialogues
    contradict the prompt that stands beside them.
    """
    dialogues = [c for c in completions if isinstance(c, list) and _is_whole(prompt, c)]
    if len(dialogues) < len(completions) and _share_the_prompt(prompt, completions):
        dialogues = [c for c in completions if isinstance(c, list)]
    if not dialogues:
        return prompt, completions

    if len(dialogues) == len(completions) > 1:
        shared = shared_turns(dialogues)
        if not _agrees(prompt, dialogues[0][:shared]):
            raise _contradiction(prompt, dialogues[0])
        return dialogues[0][:shared], [dialogue[shared:] for dialogue in dialogues]

    # One dialogue alone, or dialogues beside answers: the prompt says where they are cut.
    cut: list[Text] = []
    for completion in completions:
        if isinstance(completion, list) and _is_whole(prompt, completion):
            end = _end_of_prompt(prompt, completion)
            cut.append(completion[end:])
        else:
            cut.append(completion)
    first = dialogues[0]
    return first[: _end_of_prompt(prompt, first)], cut


def shared_turns(dialogues: Sequence[list[Message]]) -> int:
    """How many turns all dialogues begin with; each keeps at least its last one."""
    limit = min(map(len, dialogues)) - 1
    first = dialogues[0]
    for place in range(limit):
        if not all(_same_turn(first[place], other[place]) for other in dialogues[1:]):
            return place
    return limit


def split_turns(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """A dialogue's prompt, which ends before the first turn that is trained, and the rest up to the
    last such turn. Raises BadRow where there is none.
    """
    own = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not own:
        raise BadRow("role", "no assistant turn to learn from")
    trained = [place for place in own if is_trained(messages[place])]
    if not trained:
        raise BadRow("untrained", "every assistant turn")

    # A prompt ends where the assistant begins to write.
    first = trained[0]
    while first > 0 and messages[first - 1]["role"] == "assistant":
        first -= 1
    return messages[:first], messages[first : trained[-1] + 1]


def _is_whole(prompt: Text, completion: list[Message]) -> bool:
    """Whether a completion holds the conversation from its beginning, and not the answer alone."""
    if not completion:
        return False
    if completion[0]["role"] in _OPENING_ROLES:
        return True
    return isinstance(prompt, list) and bool(prompt) and _place_of(prompt, completion) == 0


def _share_the_prompt(prompt: Text, completions: Sequence[Text]) -> bool:
    """Whether several completions begin with the assistant's greeting and then hold the prompt."""
    lists = [c for c in completions if isinstance(c, list) and c]
    if len(lists) < max(len(completions), 2) or not prompt:
        return False
    shared = lists[0][: shared_turns(lists)]
    if isinstance(prompt, list):
        return _place_of(prompt, shared) is not None
    return any(_says(message, prompt) for message in shared)


def _end_of_prompt(prompt: Text, dialogue: list[Message]) -> int:
    """The number of turns of `dialogue` that are its prompt. Raises BadRow."""
    if isinstance(prompt, list) and prompt:
        place = _place_of(prompt, dialogue[:-1])
        if place is None:
            raise _contradiction(prompt, dialogue)
        return place + len(prompt)

    ends = [i for i, message in enumerate(dialogue) if i and message["role"] == "assistant"]
    if not prompt or not str(prompt).strip():
        return ends[0]
    exact = [end for end in ends if _says(dialogue[end - 1], str(prompt))]
    transcript = [end for end in ends if _agrees(prompt, dialogue[:end])]
    if exact:
        return exact[0]
    if transcript:
        return transcript[-1]
    raise _contradiction(prompt, dialogue)


def _agrees(prompt: Text, turns: Sequence[Message]) -> bool:
    """Whether `prompt` says the same as the beginning of a dialogue, in whole or in part."""
    if isinstance(prompt, list):
        return not prompt or _place_of(prompt, turns) is not None
    if not prompt.strip() or any(_says(message, prompt) for message in turns):
        return True

    # Or it writes all turns down one behind the other: then it is made of them for the most part.
    transcript = _squeezed(prompt)
    spoken = [_squeezed(message["content"]) for message in turns if message["role"] != "system"]
    place = 0
    for text in spoken:
        start = transcript.find(text, place)
        if start < 0:
            return False
        place = start + len(text)
    whole = sum(len(_squeezed(message["content"])) for message in turns)
    return bool(spoken) and 2 * whole >= len(transcript)


def _place_of(prompt: Sequence[Message], turns: Sequence[Message]) -> int | None:
    """Where the turns of `prompt` stand in `turns`, one behind the other; None where they do not."""
    for place in range(len(turns) - len(prompt) + 1):
        if all(_same_turn(ours, theirs) for ours, theirs in zip(prompt, turns[place:])):
            return place
    return None


def _same_turn(first: Message, second: Message) -> bool:
    """Whether two turns say the same; white space and keys that no template shows may differ."""
    return (
        first["role"] == second["role"]
        and _squeezed(first["content"]) == _squeezed(second["content"])
        and all(first.get(key) == second.get(key) for key in _COMPARED)
    )


def _says(message: Message, prompt: str) -> bool:
    return message["role"] == "user" and _squeezed(message["content"]) == _squeezed(prompt)


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _contradiction(prompt: Text, dialogue: Sequence[Message]) -> BadRow:
    asked = next((m["content"] for m in dialogue if m["role"] == "user"), "")
    given = prompt if isinstance(prompt, str) else next((m["content"] for m in prompt[-1:]), "")
    return BadRow(
        "contradicting_prompt",
        f"the prompt is {given[:60]!r}, the dialogue beside it begins with {asked[:60]!r}",
    )
