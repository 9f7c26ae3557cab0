"""Several reward models as one reward: their mean, less so many times their disagreement."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from alignkit.errors import DataError
from alignkit.metrics.intervals import Array


class Ensemble:
    """mean - pessimism * standard deviation of the members' scores, completion by completion.

    What the members do not agree on is what their data do not tell, so that a lower confidence bound
    keeps a policy where they do (Zhu et al. 2023, arXiv:2301.11270; Coste et al. 2023,
    arXiv:2310.02743). The deviation is that of these members, divided by their number. Rewards are
    known up to a constant: members that were trained with `objective.centre` share theirs.
    """

    def __init__(self, members: Sequence[Callable[..., Sequence[float]]], pessimism: float = 0.0):
        self.members = list(members)
        self.pessimism = pessimism
        self.metrics: dict[str, float] = {}

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float]:
        """One score per completion; `metrics` holds the mean disagreement of the call."""
        scores = self.scores(prompts, completions, **columns)
        disagreement = scores.std(0)
        self.metrics = {"disagreement": float(disagreement.mean()) if disagreement.size else 0.0}
        lower: list[float] = (scores.mean(0) - self.pessimism * disagreement).tolist()
        return lower

    def scores(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Array:
        """What each member says: [members, completions]."""
        every = [member(prompts, completions, **columns) for member in self.members]
        return np.array(every, dtype=float).reshape(len(self.members), len(completions))


def most_disputed(
    scores: Array, pairs: Sequence[tuple[int, int]], most: int
) -> list[tuple[int, int]]:
    """The `most` of some pairs of completions on whose difference the members [M, N] disagree most,
    the most disputed first; of equal ones those that come first. A judge is asked about such pairs
    (Wu and Sun 2023, arXiv:2310.14554).
    """
    if scores.ndim != 2:
        raise DataError(f"most_disputed: scores are {list(scores.shape)}; they must be [M, N]")
    gaps = [float((scores[:, first] - scores[:, second]).std()) for first, second in pairs]
    order = sorted(range(len(pairs)), key=lambda place: -gaps[place])
    return [pairs[place] for place in order[:most]]
