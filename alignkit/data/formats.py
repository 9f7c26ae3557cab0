"""Which format the columns of a source have, and which formats an objective can use."""

from collections.abc import Sequence
from difflib import get_close_matches

from alignkit.errors import ConfigError, DataError

# Format -> its columns. The most specific format comes first: the first one whose columns are all
# there is the format of the data.
COLUMNS: dict[str, tuple[str, ...]] = {
    "pair": ("prompt", "chosen", "rejected"),
    "ranking": ("prompt", "ranking"),
    "implicit_pair": ("chosen", "rejected"),
    "labelled": ("prompt", "completion", "label"),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "prompt": ("prompt",),
}
# Data family of an objective -> formats that it can use, the best first. Online families need
# prompts alone; other columns go to the rewards.
FORMATS: dict[str, tuple[str, ...]] = {
    "pair": ("pair", "implicit_pair"),
    "sequence": ("completion", "messages", "text", "pair", "implicit_pair"),
    "labelled": ("labelled", "pair", "implicit_pair"),
    "ranked": ("ranking", "pair", "implicit_pair"),
    "rollout": ("prompt",),
    "game": ("prompt",),
}
# Family -> what an error asks for.
DESCRIPTIONS = {
    "pair": "preference pairs: columns prompt, chosen and rejected, "
    "or chosen and rejected that both begin with the prompt",
    "ranked": "rankings: columns prompt and ranking (a list of completions, best first), "
    "or preference pairs",
    "sequence": "demonstrations: columns prompt and completion, or messages, or text "
    "(of pairs, chosen is used)",
    "labelled": "labelled completions: columns prompt, completion and label (true or false), "
    "or preference pairs",
    "rollout": "prompts: a column prompt",
    "game": "prompts: a column prompt",
}
# Our column -> what other data sets call it.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "instruction", "input", "query", "problem", "context"),
    "chosen": (
        "preferred",
        "accepted",
        "winner",
        "better",
        "positive",
        "good",
        "response_chosen",
        "chosen_response",
    ),
    "rejected": (
        "dispreferred",
        "refused",
        "loser",
        "worse",
        "negative",
        "bad",
        "response_rejected",
        "rejected_response",
    ),
    "ranking": ("ranked", "completions", "responses"),
    "completion": ("response", "answer", "output", "solution", "reply"),
    "messages": ("conversation", "conversations", "dialog", "dialogue"),
    "text": ("content", "document", "story"),
    "label": ("desirable", "thumbs_up", "is_good", "labels"),
}


# Family -> an objective to suggest for its data; `game` needs the same rows as `rollout`.
SUITED_OBJECTIVES = {
    "pair": "dpo",
    "sequence": "sft",
    "labelled": "kto",
    "ranked": "reward_model",
    "rollout": "an online objective",
}


def conversation_column(columns: Sequence[str], family: str | None) -> dict[str, str]:
    """Our column -> ShareGPT's column of conversations, where an objective of `family` can use it:
    they are the dialogues, or the prompts of the answers beside them.
    """
    theirs = next((name for name in ("conversations", "conversation") if name in columns), None)
    if theirs is None or {"messages", "prompt"} & set(columns):
        return {}
    ours = "prompt" if {"chosen", "rejected"} <= set(columns) else "messages"
    usable = {name for format in FORMATS.get(family or "", COLUMNS) for name in COLUMNS[format]}
    return {ours: theirs} if ours in usable else {}


def detect_format(columns: Sequence[str], given: str, family: str | None, where: str) -> str:
    """The format to read rows with `columns` in, for an objective
    of `family` (None: what fits the columns best).

    `given` is the configured format or auto; `where` names the source in errors. Raises DataError
    when the family cannot use these columns: it lists them, says what is needed and suggests the
    nearest mapping. Raises ConfigError for an unknown family.
    """
    if family is not None and family not in FORMATS:
        raise ConfigError(f"data: there is no family `{family}`; it is one of {', '.join(FORMATS)}")

    present = [name for name, needed in COLUMNS.items() if set(needed) <= set(columns)]
    allowed = FORMATS[family] if family else tuple(COLUMNS)
    if given != "auto":
        if given not in present:
            needed = COLUMNS[given]
            detail = f"data.format={given} needs {', '.join(needed)}"
            raise _mismatch(columns, family, where, needed, detail)
        if given not in allowed:
            detail = f"data.format={given} cannot serve this objective"
            raise _mismatch(columns, family, where, (), detail)
        return given

    usable = [name for name in allowed if name in present]
    if not usable:
        nearest = min(allowed, key=lambda name: _absent_columns(columns, COLUMNS[name]))
        raise _mismatch(columns, family, where, COLUMNS[nearest], _suited_objectives(present))
    if family == "sequence" and "labelled" in present:
        detail = (
            "they carry a label, and sft would learn the undesirable ones too "
            "(data.format=completion: do so)"
        )
        raise _mismatch(columns, family, where, (), detail)
    return usable[0]


def similar_columns(columns: Sequence[str], needed: Sequence[str]) -> dict[str, str]:
    """Needed column -> the column of the source that looks most like it."""
    free = {name.lower(): name for name in columns if name not in needed}
    similar = {}
    for column in needed:
        if column in columns:
            continue
        candidates = [
            *(synonym for synonym in SYNONYMS[column] if synonym in free),
            *get_close_matches(column, list(free), n=1, cutoff=0.7),
        ]
        if candidates:
            similar[column] = free.pop(candidates[0])
    return similar


def _absent_columns(columns: Sequence[str], needed: Sequence[str]) -> int:
    """How many needed columns are there neither by name nor by a similar name."""
    return len(set(needed) - set(columns) - set(similar_columns(columns, needed)))


def _suited_objectives(present: Sequence[str]) -> str:
    """Which objectives can use the formats that are present, as part of an error."""
    suited = [
        objective
        for family, objective in SUITED_OBJECTIVES.items()
        if any(name in present for name in FORMATS[family])
    ]
    return f"these rows suit {' or '.join(suited)}" if suited else ""


def _mismatch(
    columns: Sequence[str], family: str | None, where: str, needed: Sequence[str], detail: str
) -> DataError:
    """The error for columns that cannot be used; empty parts are left out."""
    if family:
        description = DESCRIPTIONS[family]
    else:
        description = "one of " + "; ".join(", ".join(names) for names in COLUMNS.values())

    mapping = [
        f"data.columns.{ours}={theirs}" for ours, theirs in similar_columns(columns, needed).items()
    ]
    advice = "name other columns with data.columns.OURS=THEIRS"
    if mapping:
        advice = f"try {' '.join(mapping)}"

    there = ", ".join(columns) or "none"
    parts = [f"{where}: the columns are {there}", f"needed are {description}", detail, advice]
    return DataError("; ".join(part for part in parts if part))
