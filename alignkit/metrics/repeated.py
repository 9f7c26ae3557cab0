"""Many answers to one prompt, and many models on the same answers: coverage and its curve, resampling by
a verifier that errs, and distances between models by their log-likelihoods.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import exp

import numpy as np
from numpy.typing import ArrayLike

from alignkit.errors import ConfigError
from alignkit.metrics.intervals import Array


@dataclass(frozen=True)
class CoverageCurve:
    """pass@k = exp(-scale * k^-rate), which looks like a straight line in log k where it is far from
    0 and 1. Brown et al. 2024, arXiv:2407.21787, eq. 2.
    """

    scale: float
    rate: float

    def at(self, k: float) -> float:
        """The share of prompts that `k` answers cover by the curve."""
        return exp(-self.scale * k**-self.rate)


def fit_coverage(pass_at: Mapping[int, float]) -> CoverageCurve | None:
    """The curve through pass@k of several k, by least squares in log(-log pass@k) against log k.

    None where fewer than two of them are strictly between 0 and 1: nothing can be fitted to those.

    >>> curve = fit_coverage({1: 0.1, 2: 0.2, 4: 0.35})
    >>> round(curve.at(4), 2)
    0.35
    """
    inside = {k: share for k, share in pass_at.items() if 0 < share < 1}
    if len(inside) < 2:
        return None
    across = np.log(np.array(list(inside), dtype=float))
    up = np.log(-np.log(np.array(list(inside.values()))))
    slope, height = np.polyfit(across, up, 1)
    return CoverageCurve(float(np.exp(height)), float(-slope))


def verified_at_k(
    correct: Sequence[int],
    n: int,
    k: int,
    *,
    wrongly_accepted: float,
    wrongly_refused: float = 0.0,
) -> float:
    """Mean over prompts of P(the first answer that a verifier accepts, among `k`, is right), from
    `correct` right answers out of `n` per prompt; where it accepts none there is no answer.

    The verifier accepts a wrong answer with probability `wrongly_accepted` and refuses a right one
    with `wrongly_refused`. The mean over all orders of the n answers, so unbiased for what k fresh
    answers would give; with a perfect verifier it is pass@k. However large k, it stays below 1
    wherever wrong answers are accepted: Stroebl et al. 2024, arXiv:2411.17501.

    ConfigError unless 1 <= k <= n, every count is in [0, n] and both rates are in [0, 1].
    """
    rates = (wrongly_accepted, wrongly_refused)
    counts = bool(correct) and all(0 <= count <= n for count in correct)
    if not counts or not 1 <= k <= n or any(not 0 <= rate <= 1 for rate in rates):
        raise ConfigError(
            f"verified_at_k: k {k}, n {n}, correct {list(correct)[:8]}, rates {rates}; needs prompts, "
            "1 <= k <= n, 0 <= correct <= n, and rates in [0, 1]"
        )

    @cache
    def right_first(right: int, wrong: int, left: int) -> float:
        if left == 0 or right == 0:
            return 0.0
        share = right / (right + wrong)
        chance = share * (1 - wrongly_refused)
        chance += share * wrongly_refused * right_first(right - 1, wrong, left - 1)
        if wrong:
            chance += (1 - share) * (1 - wrongly_accepted) * right_first(right, wrong - 1, left - 1)
        return chance

    return sum(right_first(count, n - count, k) for count in correct) / len(correct)


def verified_in_the_limit(
    p: float, *, wrongly_accepted: float, wrongly_refused: float = 0.0
) -> float:
    """What `verified_at_k` tends to for one prompt that is answered rightly with probability `p`."""
    right = p * (1 - wrongly_refused)
    accepted = right + (1 - p) * wrongly_accepted
    return right / accepted if accepted else 0.0


def model_map(logps: Mapping[str, ArrayLike]) -> dict[str, dict[str, float]]:
    """KL between each two models from their log-probs [P, K] of the same K texts per prompt, in nats
    per text: half the variance of log p - log q over a prompt's texts, and the mean over prompts.

    Right to second order where two models are close and the texts come from one near both; a constant
    of a model or a prompt does not count. Oyama et al. 2025, arXiv:2502.16173. ConfigError for fewer
    than two texts per prompt or arrays of different shapes.
    """
    arrays: dict[str, Array] = {name: np.asarray(v, dtype=float) for name, v in logps.items()}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) > 1 or any(len(shape) != 2 or shape[1] < 2 for shape in shapes):
        raise ConfigError(
            f"model_map: log-probs of shapes {sorted(shapes)}; every model needs the same [prompts, "
            "texts], with at least two texts per prompt"
        )
    return {
        name: {
            other: float(((one - two).var(axis=1, ddof=1) / 2).mean())
            for other, two in arrays.items()
        }
        for name, one in arrays.items()
    }
