"""Rewards of single tokens: what a function returns as a list of numbers for a completion."""

import math
from collections.abc import Sequence
from typing import Any

from alignkit.errors import DataError
from alignkit.rewards.checks import finite_or_inf

TokenRewards = list[list[float] | None]  # one number per own token; None: one number for all


def split(name: str, values: Any, ids: Sequence[Sequence[int]] | None) -> tuple[Any, TokenRewards]:
    """What a reward returned, with the sum in the place of each list of numbers; and these lists.

    `ids` are the own tokens of each completion, of which each needs one number. DataError for lists
    of another length. What is neither a number nor a list is left for `checked` to refuse, and so
    are lists where the tokens are not known.
    """
    values = values.tolist() if hasattr(values, "tolist") else values
    if ids is None or isinstance(values, str) or not isinstance(values, Sequence):
        return values, []

    scores: list[Any] = []
    by_token: TokenRewards = []
    for row, given in enumerate(values):
        entry = given.tolist() if getattr(given, "ndim", 0) == 1 else given
        if not isinstance(entry, list | tuple):
            scores.append(given)
            by_token.append(None)
            continue

        tokens = len(ids[row]) if row < len(ids) else None
        if tokens != len(entry):
            raise DataError(
                f"reward {name} returned {len(entry)} numbers for completion {row}, which has "
                f"{'no known' if tokens is None else tokens} tokens; return one number, or one for "
                "each entry of its completion_ids"
            )
        numbers = [_number(name, number, row) for number in entry]
        scores.append(math.fsum(numbers) if all(map(math.isfinite, numbers)) else math.nan)
        by_token.append(numbers)
    return scores, by_token


def added(
    total: TokenRewards, part: TokenRewards, scores: Sequence[float | None], *, weight: float
) -> TokenRewards:
    """`total`, one list per completion, plus `weight` times a part's rewards: its list where there
    is one, else its score at the last token.
    """
    sums: TokenRewards = []
    for row, (before, score) in enumerate(zip(total, scores, strict=True)):
        assert before is not None
        numbers = part[row] if part else None
        after = list(before)
        if numbers is not None and score is not None:
            after = [old + weight * new for old, new in zip(before, numbers)]
        elif score is not None and after:
            after[-1] += weight * score
        sums.append(after)
    return sums


def _number(name: str, value: Any, row: int) -> float:
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return finite_or_inf(value)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(
            f"reward {name} returned {value!r} ({type(value).__name__}) among the numbers of "
            f"completion {row}; each should be a number"
        ) from None
