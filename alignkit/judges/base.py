"""Verdicts, symmetrised over both orders, and the Bradley-Terry judge of any reward."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from alignkit.errors import ConfigError, DataError

# One order, one answer per query: the probability that the first wins; anything else (None, -1,
# nan, text) is no verdict.
Ask = Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], Sequence[Any]]
_GRID = 2.0**53  # probabilities are multiples of 2^-53, so that P(a, b) + P(b, a) = 1 holds exactly


@dataclass(frozen=True)
class Verdict:
    """What a judge says of B queries. Where `valid` is False the probability is 1/2 and means
    nothing.
    """

    probability: Tensor  # [B] float64 in [0, 1]: the first completion beats the second
    valid: Tensor  # [B] bool


class Judge(Protocol):
    """Compares completions of the same prompts."""

    def __call__(
        self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]
    ) -> Verdict:
        """B prompts (texts or chats) and two completions of each."""
        ...


class BothOrders:
    """A judge from one-order answers: P = 1/2 [p(first | a, b) + 1 - p(first | b, a)]; identical
    texts are exactly 1/2.

    A verdict needs both orders; one invalid order makes it invalid. `symmetrise=False` asks in the
    given order alone. `metrics` describes the last call: `judge/invalid` is the share of invalid
    verdicts.
    """

    def __init__(self, ask: Ask, *, name: str = "judge", symmetrise: bool = True):
        self.ask = ask
        self.name = name
        self.symmetrise = symmetrise
        self.metrics: dict[str, float] = {}

    def __call__(
        self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]
    ) -> Verdict:
        """See `Judge`. DataError when the answers are not one per query."""
        asked = _different(first, second)
        forward = self._answers(
            [prompts[i] for i in asked], [first[i] for i in asked], [second[i] for i in asked]
        )
        if self.symmetrise:
            n = len(asked)
            forward, backward = forward[:n], forward[n:]
        else:
            backward = 1 - forward
        verdict = _verdict(len(first), asked, 0.5 * (forward - backward))
        self.metrics = {
            "judge/invalid": 1 - float(verdict.valid.double().mean()) if len(first) else 0.0
        }
        return verdict

    def _answers(self, prompts: list[Any], first: list[Any], second: list[Any]) -> Tensor:
        """Probabilities, nan for no verdict: [n], or [2n] with the swapped order behind when
        symmetrising.
        """
        if self.symmetrise:
            prompts, first, second = prompts * 2, first + second, second + first
        answers = self.ask(prompts, first, second) if prompts else []
        answers = answers.tolist() if hasattr(answers, "tolist") else answers
        if (
            isinstance(answers, str)
            or not isinstance(answers, Sequence)
            or len(answers) != len(prompts)
        ):
            given = (
                f"{len(answers)} answers"
                if isinstance(answers, list | tuple)
                else f"a {type(answers).__name__}"
            )
            raise DataError(
                f"judge {self.name} returned {given} for {len(prompts)} queries; it should return a list with one each"
            )
        return torch.tensor([_probability(answer) for answer in answers], dtype=torch.float64)


class BradleyTerry:
    """P = sigmoid((reward(first) - reward(second)) / temperature); temperature 0: the higher reward
    wins, equal ones tie.

    The model of Bradley & Terry 1952. A completion without a reward (None) makes the verdict
    invalid.
    """

    def __init__(self, reward: Callable[..., Sequence[float | None]], *, temperature: float = 1.0):
        if not 0 <= temperature < math.inf:
            raise ConfigError(f"judge.temperature: {temperature} is not allowed; at least 0")
        self.reward = reward
        self.temperature = temperature
        self.metrics: dict[str, float] = {}

    def __call__(
        self, prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]
    ) -> Verdict:
        """See `Judge`."""
        asked = _different(first, second)
        both = [first[i] for i in asked] + [second[i] for i in asked]
        scores = self.reward([prompts[i] for i in asked] * 2, both) if asked else []
        rewards = torch.tensor(
            [math.nan if score is None else score for score in scores], dtype=torch.float64
        )
        gap = rewards[: len(asked)] - rewards[len(asked) :]
        half = 0.5 * (
            torch.tanh(gap / (2 * self.temperature)) if self.temperature else torch.sign(gap)
        )
        verdict = _verdict(len(first), asked, torch.where(gap.isnan(), gap, half))
        self.metrics = {
            "judge/invalid": 1 - float(verdict.valid.double().mean()) if len(first) else 0.0
        }
        return verdict


def _different(first: Sequence[Any], second: Sequence[Any]) -> list[int]:
    """Queries that need an answer: a text against itself is a tie, whatever a judge says."""
    return [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]


def _probability(answer: Any) -> float:
    """A probability, or nan for anything that is none."""
    try:
        number = math.nan if isinstance(answer, str | bytes) or answer is None else float(answer)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan
    return number if 0 <= number <= 1 else math.nan


def _verdict(n: int, asked: Sequence[int], advantage: Tensor) -> Verdict:
    """1/2 + advantage at the queries asked (nan: invalid), exactly 1/2 at the others."""
    probability = torch.full((n,), 0.5, dtype=torch.float64)
    valid = torch.ones(n, dtype=torch.bool)
    index = torch.tensor(asked, dtype=torch.int64)
    known = ~advantage.isnan()
    probability[index[known]] += torch.round(advantage[known] * _GRID) / _GRID
    valid[index[~known]] = False
    return Verdict(probability, valid)
