"""What a user's reward function may return, and one clear error for everything else."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from alignkit.distributed import deadline
from alignkit.errors import DataError, NumericsError, ResourceError

T = TypeVar("T")
_SHOWN = 160  # characters of a prompt or completion quoted in an error

# Rewards beyond this size count as infinite. Squares and sums of smaller ones, which credit and
# metrics take, are finite in float64.
LARGEST = 1e100


def checked(
    name: str, values: Any, prompts: Sequence[Any], completions: Sequence[Any], *, drop: bool
) -> tuple[list[float | None], list[int]]:
    """`values` as one float or None per completion, and the rows with nan or inf, which are None
    too. A number beyond 1e100 in size, such as the integer 10**400, counts as infinite.

    Raises DataError for anything that is not a sequence of N numbers, NumericsError for nan or inf
    unless `drop`.
    """
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise DataError(
            f"reward {name} returned {_short(values)} ({type(values).__name__}); it should return "
            f"a list with one number or None for each of the {len(completions)} completions"
        )
    if len(values) != len(completions):
        raise DataError(
            f"reward {name} returned {len(values)} values for {len(completions)} completions; "
            "it should return one for each"
        )

    numbers = [_number(name, value, row, prompts, completions) for row, value in enumerate(values)]
    bad_rows = [
        row
        for row, number in enumerate(numbers)
        if number is not None and not math.isfinite(number)
    ]
    if bad_rows and not drop:
        kinds = " and ".join(sorted({str(numbers[row]) for row in bad_rows}))
        first = bad_rows[0]
        raise NumericsError(
            f"reward {name} returned {kinds} for {len(bad_rows)} of {len(numbers)} completions "
            f"(rows {_rows(bad_rows)}); first: {quoted(prompts[first], completions[first])}; mend "
            "the function, or set `on_bad: drop` to set such rows aside"
        )

    aside = set(bad_rows)
    return [None if row in aside else number for row, number in enumerate(numbers)], bad_rows


def _number(
    name: str, value: Any, row: int, prompts: Sequence[Any], completions: Sequence[Any]
) -> float | None:
    if value is None:
        return None
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return finite_or_inf(value)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(
            f"reward {name} returned {_short(value)} ({type(value).__name__}) for row {row}; each "
            f"value should be a number or None; {quoted(prompts[row], completions[row])}"
        ) from None


def finite_or_inf(value: Any) -> float:
    """A reward as a float, infinite where it is beyond LARGEST; nan stays nan."""
    try:
        number = float(value)
    except OverflowError:  # integers and fractions may be larger than any float
        return math.inf if value > 0 else -math.inf
    return math.copysign(math.inf, number) if abs(number) > LARGEST else number


def within(seconds: float | None, what: str, call: Callable[[], T]) -> T:
    """The result of `call`, without gradients; ResourceError says that it took longer than `seconds`.
    With None it may take as long as it takes.

    It runs in this thread where that is the main one, else under a limit in a thread of its own.
    """

    def without_gradients() -> T:
        with torch.no_grad():
            return call()

    if seconds is None:
        return without_gradients()
    try:
        # Once more around it: the limit may interrupt anything inside, even the way out.
        with torch.no_grad():
            return deadline.within(seconds, what, without_gradients)
    except deadline.TimeIsUp:
        raise ResourceError(
            f"{what} did not return within {seconds:g} s; raise its `timeout`, or mend it (a "
            "reward that can hang on a single completion should be a `verifier`)"
        ) from None


def refusal_of_signals(what: str, error: Exception) -> DataError | None:
    """The error for a function that sets a signal where Python allows none; None where `error` says
    something else.
    """
    if not (isinstance(error, ValueError) and "main thread" in str(error)):
        return None
    return DataError(
        f"{what} sets a signal (a timeout of its own), which Python allows in the main thread alone; "
        "run alignkit in the main thread, or take the signal out of it (a reward can be a "
        "`verifier`, which has a process of its own)"
    )


def quoted(prompt: Any, completion: Any) -> str:
    """A prompt and completion, cut short, for an error message."""
    return f"prompt {_short(prompt)}, completion {_short(completion)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _rows(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
