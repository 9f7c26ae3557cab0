"""A process reward model as a reward: a solution is as good as its steps."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from alignkit.errors import DataError

Scores = Callable[[Sequence[Any], Sequence[Any]], Sequence[float]]
Reduce = Literal["min", "product", "last"]


class StepRewards:
    """The log-probability that the steps of a completion are right: of the worst one (min), of all of
    them (product) or of the last (last).

    `model` gives the log-odds of a text's last step. A completion is cut behind every `separator`,
    and what is behind the last one is a step too; one that is empty has no score.
    """

    def __init__(self, model: Scores, separator: str, reduce: Reduce = "min"):
        self.model = model
        self.separator = separator
        self.reduce = reduce

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any
    ) -> list[float | None]:
        """One score per completion, at most 0. DataError for completions that are no texts."""
        beginnings = [self._beginnings(text) for text in completions]
        texts = [prompt for prompt, parts in zip(prompts, beginnings) for _ in parts]
        odds = iter(self.model(texts, [part for parts in beginnings for part in parts]))

        scores: list[float | None] = []
        for parts in beginnings:
            # log sigmoid(x), in a form that never overflows
            logps = [
                min(x, 0.0) - math.log1p(math.exp(-abs(x))) for x in (next(odds) for _ in parts)
            ]
            scores.append(self._reduced(logps) if logps else None)
        return scores

    def _beginnings(self, completion: Any) -> list[str]:
        """The completion up to the end of each of its steps."""
        if not isinstance(completion, str):
            raise DataError("rewards.steps: completions are chats; steps are parts of a text")
        steps = [step for step in completion.split(self.separator) if step.strip()]
        texts = []
        text = ""
        for step in steps:
            text += step + self.separator
            texts.append(text)
        return texts

    def _reduced(self, logps: Sequence[float]) -> float:
        if self.reduce == "min":
            return min(logps)
        return math.fsum(logps) if self.reduce == "product" else logps[-1]
