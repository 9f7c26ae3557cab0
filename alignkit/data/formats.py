"""Which format the columns of a source have, and which formats an objective's data family can use."""

from collections.abc import Sequence
from difflib import get_close_matches

from alignkit.errors import ConfigError, DataError

# Format -> needed columns, the most specific first: the first whose columns are all there is what
# the data are.
NEEDS: dict[str, tuple[str, ...]] = {
    "pair": ("prompt", "chosen", "rejected"),
    "ranking": ("prompt", "ranking"),
    "implicit_pair": ("chosen", "rejected"),
    "labelled": ("prompt", "completion", "label"),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "prompt": ("prompt",),
}
# Family -> formats it can use, the best first. Online families need prompts alone; other columns go
# to the rewards.
ACCEPTS: dict[str, tuple[str, ...]] = {
    "pair": ("pair", "implicit_pair"),
    "sequence": ("completion", "messages", "text", "pair", "implicit_pair"),
    "labelled": ("labelled",),
    "ranked": ("ranking", "pair", "implicit_pair"),
    "rollout": ("prompt",),
    "game": ("prompt",),
}
WANTED = {
    "pair": "preference pairs: columns prompt, chosen and rejected, or chosen and rejected that both begin with the prompt",
    "ranked": "rankings: columns prompt and ranking (a list of completions, best first), or preference pairs",
    "sequence": "demonstrations: columns prompt and completion, or messages, or text (of pairs, chosen is used)",
    "labelled": "labelled completions: columns prompt, completion and label (true or false)",
    "rollout": "prompts: a column prompt",
    "game": "prompts: a column prompt",
}
# What other data sets call our columns.
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


def detect(columns: Sequence[str], given: str, family: str | None, where: str) -> str:
    """The format to read rows with `columns` in, for an objective of `family` (None: what fits the
    columns best).

    `given` is the configured format or auto. Errors: DataError when the family cannot use what is
    there; it names the columns found, what is needed and the nearest mapping. ConfigError for an
    unknown family.
    """
    if family is not None and family not in ACCEPTS:
        raise ConfigError(f"data: there is no family `{family}`; it is one of {', '.join(ACCEPTS)}")
    present = [name for name, needs in NEEDS.items() if set(needs) <= set(columns)]
    allowed = ACCEPTS[family] if family else tuple(NEEDS)
    if given != "auto":
        if given not in present:
            raise _mismatch(
                columns,
                family,
                where,
                NEEDS[given],
                f"data.format={given} needs {', '.join(NEEDS[given])}",
            )
        if given in allowed:
            return given
        raise _mismatch(
            columns, family, where, (), f"data.format={given} cannot serve this objective"
        )
    usable = [name for name in allowed if name in present]
    if usable and not (family == "sequence" and "labelled" in present):
        return usable[0]
    if usable:
        why = "they carry a label, and sft would learn the undesirable ones too (data.format=completion: do so)"
        raise _mismatch(columns, family, where, (), why)
    nearest = min(
        allowed,
        key=lambda name: len(
            set(NEEDS[name]) - set(columns) - set(suggestions(columns, NEEDS[name]))
        ),
    )
    raise _mismatch(columns, family, where, NEEDS[nearest], _alternative(present))


def suggestions(columns: Sequence[str], needed: Sequence[str]) -> dict[str, str]:
    """Needed column -> the column of the source that looks most like it."""
    free = {name.lower(): name for name in columns if name not in needed}
    found = {}
    for column in needed:
        near = [
            *(s for s in SYNONYMS[column] if s in free),
            *get_close_matches(column, list(free), n=1, cutoff=0.7),
        ]
        if column not in columns and near:
            found[column] = free.pop(near[0])
    return found


def _alternative(present: Sequence[str]) -> str:
    families = [
        family
        for family, formats in ACCEPTS.items()
        if family != "game" and any(f in present for f in formats)
    ]
    if not families:
        return ""
    uses = {
        "pair": "dpo",
        "ranked": "reward_model",
        "sequence": "sft",
        "labelled": "kto",
        "rollout": "an online objective",
    }
    return f"these rows suit {' or '.join(uses[family] for family in families)}"


def _mismatch(
    columns: Sequence[str], family: str | None, where: str, needed: Sequence[str], detail: str
) -> DataError:
    wanted = (
        WANTED[family]
        if family
        else "one of " + "; ".join(", ".join(needs) for needs in NEEDS.values())
    )
    mapping = " ".join(
        f"data.columns.{ours}={theirs}" for ours, theirs in suggestions(columns, needed).items()
    )
    parts = [
        f"{where}: the columns are {', '.join(columns) or 'none'}",
        f"needed are {wanted}",
        detail,
        f"try {mapping}" if mapping else "name other columns with data.columns.OURS=THEIRS",
    ]
    return DataError("; ".join(part for part in parts if part))
