"""Measures of completions and verdicts: pure functions of counts, scores, texts and probabilities.

Axes: P prompts, K completions of each, N pairs or verdicts.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import ArrayLike, NDArray

from alignkit.errors import ConfigError
from alignkit.metrics.intervals import Array, Interval, wilson


def pass_at_k(correct: Sequence[int], n: int, k: int) -> float:
    """Mean over prompts of P(at least one of `k` answers is right), from `correct` right answers
    out of `n` per prompt.

    1 - C(n - c, k) / C(n, k): unbiased for 1 - (1 - p)^k, unlike the same with p replaced by c / n.
    Chen et al. 2021, arXiv:2107.03374, eq. 1. ConfigError unless 1 <= k <= n and every count is in
    [0, n].

    >>> pass_at_k([2], n=4, k=2)
    0.8333333333333334
    """
    if not correct or not 1 <= k <= n or any(not 0 <= c <= n for c in correct):
        raise ConfigError(
            f"pass_at_k: k {k}, n {n}, correct {list(correct)[:8]}; "
            "needs prompts, 1 <= k <= n and 0 <= correct <= n"
        )
    return sum(1 - comb(n - c, k) / comb(n, k) for c in correct) / len(correct)


def majority_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """P(the most frequent of `k` answers to one prompt is right),
    `k` drawn from these n without replacement.

    The mean over all subsets; ties are broken at random; None abstains. `correct` says of each
    answer whether it is right. Wang et al. 2022, arXiv:2203.11171 (self-consistency). ConfigError
    unless 1 <= k <= n.

    >>> majority_at_k(["7", "7", "9"], [True, True, False], k=2)  # {7, 7}, and twice {7, 9}: a tie
    0.6666666666666666
    """
    if not 1 <= k <= len(answers) or len(answers) != len(correct):
        raise ConfigError(
            f"majority_at_k: k {k}, {len(answers)} answers, {len(correct)} marks; "
            "needs 1 <= k <= answers and a mark for each answer"
        )

    counts = Counter(answer for answer in answers if answer is not None)
    right = {answer for answer, mark in zip(answers, correct) if mark and answer is not None}
    silent = len(answers) - sum(counts.values())
    ways = sum(_winning_ways(answer, counts, silent, k) for answer in right)
    return ways / comb(len(answers), k)


def _winning_ways(winner: Hashable, counts: Counter, silent: int, k: int) -> float:
    """How many of the subsets of size k `winner` wins, a tie of t answers counted as 1 / t."""
    total = 0.0
    others = [count for answer, count in counts.items() if answer != winner]
    for votes in range(1, min(counts[winner], k) + 1):
        # (votes of the others, how many of them tie) -> subsets
        ways = {(0, 0): comb(counts[winner], votes)}
        for count in others:
            wider: dict[tuple[int, int], int] = {}
            for (used, ties), number in ways.items():
                for own in range(min(count, votes, k - votes - used) + 1):
                    key = (used + own, ties + (own == votes))
                    wider[key] = wider.get(key, 0) + number * comb(count, own)
            ways = wider
        total += sum(
            number * comb(silent, k - votes - used) / (ties + 1)
            for (used, ties), number in ways.items()
        )
    return total


def distinct_n(completions: Sequence[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams as a share of all n-grams in the K completions (token ids or words) of one
    prompt; nan without any.

    Li et al. 2016, arXiv:1510.03055. It falls with K and with length: compare equal numbers.
    """
    grams = [tuple(tokens[i : i + n]) for tokens in completions for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


@dataclass(frozen=True)
class WinRate:
    """How often the first side wins. Ties are halves; invalid verdicts are left out of `rate` and
    counted in `invalid`.
    """

    rate: Interval
    invalid: float  # share of verdicts


def win_rate(
    probability: ArrayLike, valid: ArrayLike | None = None, *, level: float = 0.95
) -> WinRate:
    """Win rate from verdicts [P] or [P, K], symmetrised over both orders (alignkit.judges):
    `probability` that the first wins, and whether each verdict is `valid`.

    The interval is Wilson's for the effective number of prompts (as many as give the same spread of
    the prompts' means), so that it keeps its width where one side always wins. All verdicts
    invalid: a rate of nan.
    """
    wins = np.asarray(probability, dtype=float)
    known = np.ones(wins.shape, dtype=bool) if valid is None else np.asarray(valid, dtype=bool)
    invalid = 1 - float(known.mean())
    wins = wins.reshape(len(wins), -1)
    known = known.reshape(len(known), -1)
    if not known.any():
        return WinRate(Interval(float("nan"), float("nan"), float("nan"), level), invalid)

    # Means of the prompts that have at least one valid verdict.
    judged = known.any(-1)
    counts = known[judged].sum(-1)
    means = np.where(known[judged], wins[judged], 0).sum(-1) / counts
    return WinRate(wilson(means, level=level), invalid)


def score_wins(first: ArrayLike, second: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
    """Verdicts of a judge that looks at the score alone, [...] and [...] -> ([...], [...]).

    The first result is 1 where `first` is higher and 1/2 where both are equal; the second says
    where both have a score.
    """
    gap = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    known = ~np.isnan(gap)
    return np.where(known, (np.sign(gap) + 1) / 2, 0.5), known


def length_controlled_win_rate(
    probability: ArrayLike, first_lengths: ArrayLike, second_lengths: ArrayLike
) -> float:
    """The win rate had both sides been equally long: sigmoid(a) of the logistic regression P(first
    wins) = sigmoid(a + b x), x = tanh(difference of length / its standard deviation), over N
    verdicts.

    Dubois et al. 2024, arXiv:2404.04475, without the term for a prompt's difficulty, which needs
    several models. A weak ridge on b (1e-3) keeps it finite where length decides every verdict.
    """
    wins = np.asarray(probability, dtype=float).ravel()
    gap = (np.asarray(first_lengths, dtype=float) - np.asarray(second_lengths, dtype=float)).ravel()
    spread = gap.std()
    length_term = np.tanh(gap / spread) if spread > 0 else np.zeros_like(gap)
    design = np.stack([np.ones_like(gap), length_term], -1)  # [N, 2]

    # Newton's method for the weights (a, b).
    weights = np.zeros(2)
    ridge = np.array([1e-9, 1e-3])
    for _ in range(100):
        fitted = 1 / (1 + np.exp(-design @ weights))
        slope = design.T @ (wins - fitted) / len(wins) - ridge * weights
        curvature = (design.T * (fitted * (1 - fitted))) @ design / len(wins) + np.diag(ridge)
        step = np.linalg.solve(curvature, slope)
        weights = np.clip(weights + step, -30, 30)
        if np.abs(step).max() < 1e-12:
            break

    return float(1 / (1 + np.exp(-weights[0])))


@dataclass(frozen=True)
class Calibration:
    """How confidence and accuracy agree.

    The bins (without empty ones) are what a reliability diagram shows.
    """

    accuracy: float
    error: float  # expected calibration error
    confidences: Array  # [bins] mean confidence
    accuracies: Array  # [bins]
    counts: Array  # [bins]


def calibration(
    confidence: ArrayLike, correct: ArrayLike, *, bins: int = 10, low: float = 0.5
) -> Calibration:
    """Expected calibration error of N answers, `correct` [N] or
    not, given with `confidence` [N] in [low, 1].

    It is the mean over answers of |accuracy - confidence| of their bin, for bins of equal width
    (Guo et al. 2017, arXiv:1706.04599, eq. 3).
    """
    sure = np.asarray(confidence, dtype=float)
    right = np.asarray(correct, dtype=float)
    if sure.shape != right.shape or not sure.size or not ((sure >= low) & (sure <= 1)).all():
        raise ConfigError(
            f"calibration: {sure.size} confidences, {right.size} answers; "
            f"give one confidence in [{low}, 1] per answer, and at least one answer"
        )

    # A confidence of 1 belongs to the last bin.
    bin_of = np.minimum(((sure - low) / (1 - low) * bins).astype(int), bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    used = counts > 0
    counts = counts[used]
    confidences = np.bincount(bin_of, weights=sure, minlength=bins)[used] / counts
    accuracies = np.bincount(bin_of, weights=right, minlength=bins)[used] / counts

    error = float((counts * np.abs(accuracies - confidences)).sum() / len(sure))
    return Calibration(float(right.mean()), error, confidences, accuracies, counts.astype(float))


def preference_calibration(margins: ArrayLike, *, bins: int = 10) -> Calibration:
    """Calibration on held-out pairs, from the implicit reward's margins chosen - rejected [N], in
    log-odds (beta times the difference of log-ratios for DPO).

    The model prefers the side of the higher implicit reward with confidence sigmoid(|margin|); a
    margin of 0 is half right.
    """
    margin = np.asarray(margins, dtype=float)
    confidence = 1 / (1 + np.exp(-np.abs(margin)))
    return calibration(confidence, (np.sign(margin) + 1) / 2, bins=bins)


def preference_figures(probability: ArrayLike, bias: ArrayLike | None = None) -> dict[str, float]:
    """How good a preference model is on held-out pairs, from P(the better one wins) [N],
    symmetrised over both orders.

    `accuracy`: share above 1/2, ties counting half. `calibration_error`: see `calibration`, of
    confidence max(P, 1 - P). `brier`: mean of (1 - P)^2. `bias` [N] is P(first wins | a, b) +
    P(first wins | b, a) - 1, 0 for a judge to whom the order is nothing; `position_bias` is its
    mean (> 0: prefers what stands first), `position_inconsistency` the mean of its size.
    """
    p = np.asarray(probability, dtype=float)
    fit = calibration(np.maximum(p, 1 - p), (np.sign(p - 0.5) + 1) / 2)
    scores = {
        "accuracy": fit.accuracy,
        "calibration_error": fit.error,
        "brier": float(((1 - p) ** 2).mean()),
    }
    if bias is None:
        return scores
    lean = np.asarray(bias, dtype=float)
    return scores | {
        "position_bias": float(lean.mean()),
        "position_inconsistency": float(np.abs(lean).mean()),
    }
