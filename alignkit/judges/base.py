"""Verdicts, symmetrised over both orders, and the Bradley-Terry judge of any reward."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from alignkit.errors import ConfigError, DataError

# Answers in one order, one per query: the probability that the first completion wins; anything else
# (None, -1, nan, text) is no verdict.
Ask = Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], Sequence[Any]]
_GRID = 2.0**53  # probabilities are multiples of 2^-53, so that P(a, b) + P(b, a) = 1 holds exactly


@dataclass(frozen=True)
class Verdict:
    """What a judge says of B queries.

    Where `valid` is False the probability is 1/2 and means nothing.
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
    """A judge from answers in one order: P = 1/2 [p(first | a, b) + 1 - p(first | b, a)]; identical
    texts are exactly 1/2.

    A verdict needs both orders; one invalid answer makes it invalid. `symmetrise=False` asks in the
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
        texts = [prompts[i] for i in asked]
        a = [first[i] for i in asked]
        b = [second[i] for i in asked]

        if self.symmetrise:
            # One call with both orders: a judge behind a network answers all of it at once.
            answers = self._answers(texts * 2, a + b, b + a)
            a_wins = answers[: len(asked)]
            b_wins = answers[len(asked) :]
        else:
            a_wins = self._answers(texts, a, b)
            b_wins = 1 - a_wins

        verdict = _verdict(len(first), asked, 0.5 * (a_wins - b_wins))
        self.metrics = {"judge/invalid": _share_invalid(verdict)}
        return verdict

    def _answers(self, prompts: list[Any], first: list[Any], second: list[Any]) -> Tensor:
        """Probabilities [n] in the given order, nan for no verdict."""
        answers = self.ask(prompts, first, second) if prompts else []
        answers = answers.tolist() if hasattr(answers, "tolist") else answers

        is_list = isinstance(answers, Sequence) and not isinstance(answers, str)
        if not is_list or len(answers) != len(prompts):
            given = f"{len(answers)} answers" if is_list else f"a {type(answers).__name__}"
            raise DataError(
                f"judge {self.name} returned {given} for {len(prompts)} queries; it should return "
                "a list with one each"
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

        # sigmoid(x) - 1/2 = tanh(x / 2) / 2; the sign of nan would be a tie, so nan is put back.
        if self.temperature:
            advantage = 0.5 * torch.tanh(gap / (2 * self.temperature))
        else:
            advantage = 0.5 * torch.sign(gap)
        verdict = _verdict(len(first), asked, torch.where(gap.isnan(), gap, advantage))
        self.metrics = {"judge/invalid": _share_invalid(verdict)}
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


def _share_invalid(verdict: Verdict) -> float:
    return 1 - float(verdict.valid.double().mean()) if len(verdict.valid) else 0.0


def _verdict(n: int, asked: Sequence[int], advantage: Tensor) -> Verdict:
    """1/2 + advantage at the queries asked (nan: invalid), exactly 1/2 at the others."""
    probability = torch.full((n,), 0.5, dtype=torch.float64)
    valid = torch.ones(n, dtype=torch.bool)
    index = torch.tensor(asked, dtype=torch.int64)
    known = ~advantage.isnan()
    probability[index[known]] += torch.round(advantage[known] * _GRID) / _GRID
    valid[index[~known]] = False
    return Verdict(probability, valid)
