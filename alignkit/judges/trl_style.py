"""TRL's old judges (up to 1.0.0) and ours, each as the other."""

import inspect
import random
from collections.abc import Sequence
from typing import Any

from alignkit.judges.base import Ask, Judge


def from_trl_judge(judge: Any) -> Ask:
    """One-order answers from an object with `judge(prompts,
    completions, shuffle_order)`: wrap them in `BothOrders`.

    Ranks 0 and 1 become 1.0 and 0.0; -1 (failed) stays no verdict. A judge that offers
    `return_scores` is asked for its probabilities. Its own shuffling is off: both orders are asked
    anyway, and TRL's turns a failed -1 into a 2.
    """
    scores = "return_scores" in inspect.signature(judge.judge).parameters

    def ask(
        prompts: Sequence[Any], first: Sequence[Any], second: Sequence[Any]
    ) -> list[float | None]:
        extra = {"return_scores": True} if scores else {}
        pairs = [list(pair) for pair in zip(first, second, strict=True)]
        answers = judge.judge(list(prompts), pairs, shuffle_order=False, **extra)
        if scores:
            return list(answers)
        return [{0: 1.0, 1: 0.0}.get(rank) if isinstance(rank, int) else None for rank in answers]

    return ask


class TRLStyleJudge:
    """One of our judges behind TRL's signature."""

    def __init__(self, judge: Judge, *, seed: int = 0):
        self.wrapped = judge
        self.random = random.Random(seed)

    def judge(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[Any]],
        shuffle_order: bool = True,
        return_scores: bool = False,
    ) -> list[int] | list[float]:
        """Index of the better of two completions per prompt, -1 where there is no verdict.

        `shuffle_order` presents each pair in a random order, which also decides ties.
        `return_scores`: the probability that completion 0 wins instead (nan where there is no
        verdict).
        """
        swapped = [shuffle_order and self.random.random() < 0.5 for _ in prompts]
        shown = [
            (pair[1], pair[0]) if swap else (pair[0], pair[1])
            for pair, swap in zip(completions, swapped, strict=True)
        ]
        verdict = self.wrapped(prompts, [pair[0] for pair in shown], [pair[1] for pair in shown])

        ranks = []
        scores = []
        for p, valid, swap in zip(
            verdict.probability.tolist(), verdict.valid.tolist(), swapped, strict=True
        ):
            ranks.append(int((p < 0.5) != swap) if valid else -1)
            scores.append((1 - p if swap else p) if valid else float("nan"))
        return scores if return_scores else ranks


def as_trl_judge(judge: Judge, *, seed: int = 0) -> TRLStyleJudge:
    """`judge` with TRL's `.judge(prompts, completions,
    shuffle_order)`; `seed` decides the shuffling.
    """
    return TRLStyleJudge(judge, seed=seed)
