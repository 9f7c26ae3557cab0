"""A judge's verdicts on the completions of each prompt, as rows of their bundles."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

INVALID = (
    "every verdict of the judge in this step is invalid; check the judge's answers and its endpoint"
)
Texts = Sequence[Any]  # strings, or message lists for chats
Compare = Callable[[Texts, Texts, Texts], Any]  # (prompts, first, second) -> Verdict


def judged(
    judge: Compare, prompts: Texts, texts: Sequence[Texts], against: Sequence[Texts], *, table: bool
) -> list[dict[str, Tensor] | None]:
    """Rows of each prompt with K completions; None where one of its verdicts is invalid.

    With `table` every completion meets every other: "table" [K, K], and "preference" [K], its
    means. Else each meets the first of `against`, or the last of its own where none was drawn:
    "preference" [K].
    """
    matches = [
        match
        for prompt, own in enumerate(texts)
        for match in (_all_pairs(prompt, own) if table else _one_each(prompt, own, against[prompt]))
    ]
    verdict = judge(
        [prompts[match.prompt] for match in matches],
        [match.text for match in matches],
        [match.other_text for match in matches],
    )

    # A completion that meets itself, or the last of its own, wins half of the time.
    rows = [torch.full((len(own), len(own)) if table else (len(own),), 0.5) for own in texts]
    all_valid = [True] * len(texts)
    results = zip(matches, verdict.probability.tolist(), verdict.valid.tolist(), strict=True)
    for match, probability, valid in results:
        all_valid[match.prompt] &= valid
        row = rows[match.prompt]
        if table:
            row[match.place, match.other_place] = probability
            row[match.other_place, match.place] = 1 - probability
        else:
            row[match.place] = probability

    return [_as_rows(row, table) if valid else None for row, valid in zip(rows, all_valid)]


class _Match(NamedTuple):
    """One question to the judge: does `text` beat `other_text`?"""

    prompt: int  # index of the prompt
    place: int  # of `text` among the prompt's completions
    text: Any
    other_place: int  # of `other_text`; -1: it is none of these completions
    other_text: Any


def _all_pairs(prompt: int, own: Texts) -> list[_Match]:
    """Every completion against every earlier one."""
    return [
        _Match(prompt, place, text, other, own[other])
        for place, text in enumerate(own)
        for other in range(place)
    ]


def _one_each(prompt: int, own: Texts, against: Texts) -> list[_Match]:
    """Every completion against one opponent; the last of its own is not asked about itself."""
    opponent = (against or own[-1:])[:1]
    asked = own if against else own[:-1]
    return [_Match(prompt, place, text, -1, opponent[0]) for place, text in enumerate(asked)]


def _as_rows(row: Tensor, table: bool) -> dict[str, Tensor]:
    return {"table": row, "preference": row.mean(-1)} if table else {"preference": row}
