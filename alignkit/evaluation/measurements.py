"""What was measured of one model, sample by sample, and its summary. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from alignkit.metrics.completions import distinct_n, score_wins
from alignkit.metrics.intervals import Array, Interval, known_mean, mean_interval, standard_error


@dataclass(frozen=True)
class Measured:
    """P prompts, K completions of each; arrays are [P, K], one figure per completion."""

    name: str
    prompts: list[Any]  # P texts or chats
    texts: list[list[str]]  # P x K completions
    tokens: list[list[list[int]]]  # P x K token ids, the end token included
    ended: Array  # 1 where the end token was sampled, 0 where the cap cut
    score: Array | None  # reward; nan where it does not apply; None without a reward
    # exact KL(policy || reference) of each token's distribution, summed along the sample
    # (Rao-Blackwellised)
    kl: Array
    logp: Array  # log-prob under the policy
    reference_logp: Array  # log-prob under the reference
    # of each token's distribution, summed along the sample: its mean is the entropy of the
    # completions
    entropy: Array
    # KL(reference || policy), the same way along the reference's samples
    forward_kl: Array | None = None

    def __post_init__(self) -> None:
        for name in ARRAYS:
            value = getattr(self, name)
            object.__setattr__(
                self, name, None if value is None else np.asarray(value, dtype=float)
            )

    @property
    def log_ratio(self) -> Array:
        """The plain estimator of the KL (k1): log policy - log reference of each completion [P, K]."""
        return self.logp - self.reference_logp

    @property
    def lengths(self) -> Array:
        """Tokens of each completion [P, K], the end token included."""
        return np.array([[len(ids) for ids in row] for row in self.tokens], dtype=float)

    @property
    def distinct(self) -> dict[int, Array]:
        """distinct-1 and distinct-2 of each prompt's completions: n -> [P]."""
        return {n: np.array([distinct_n(row, n) for row in self.tokens]) for n in (1, 2)}

    def per_prompt(self) -> dict[str, Array]:
        """Every figure as means per prompt [P]: what the bootstrap works on."""
        lengths = self.lengths
        found = {
            "score": self.score,
            "kl": self.kl,
            "kl_k1": self.log_ratio,
            "forward_kl": self.forward_kl,
            "entropy": self.entropy,
            "length": lengths,
            "ended": self.ended,
        }
        means = {name: known_mean(values) for name, values in found.items() if values is not None}
        means["kl_per_token"] = self.kl.sum(1) / lengths.sum(1)
        return means | {f"distinct_{n}": values for n, values in self.distinct.items()}

    def summary(
        self, *, level: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> dict[str, Interval]:
        """Mean over prompts of every figure with its bootstrap interval over prompts."""
        return {
            name: mean_interval(v, level=level, draws=draws, seed=seed)
            for name, v in self.per_prompt().items()
        }

    def standard_errors(self) -> dict[str, float]:
        """Sampling error of the means on these very prompts: `score`, `kl`, `kl_k1`, `forward_kl`."""
        found = {
            "score": self.score,
            "kl": self.kl,
            "kl_k1": self.log_ratio,
            "forward_kl": self.forward_kl,
        }
        return {
            name: standard_error(values) for name, values in found.items() if values is not None
        }

    def dump(self) -> dict[str, Any]:
        """As JSON; `Measured.load` reads it back."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: _plain(value) if name in ARRAYS and value is not None else value
            for name, value in found.items()
        }

    @classmethod
    def load(cls, found: Mapping[str, Any]) -> "Measured":
        """From what `dump` gave."""
        return cls(
            **{
                name: _array(value) if name in ARRAYS and value is not None else value
                for name, value in found.items()
            }
        )


def wins(
    first: Measured, second: Measured, judge: Callable[..., Any] | None = None
) -> tuple[Array, Array] | None:
    """P(the first's completion beats the second's under the same noise) and whether that verdict is
    valid: [P, K] each.

    By `judge` (alignkit.judges: symmetrised over both orders), else by the score: the higher wins.
    None without either.
    """
    if judge is not None:
        prompts = [prompt for prompt, row in zip(first.prompts, first.texts) for _ in row]
        verdict = judge(
            prompts,
            *([text for row in measured.texts for text in row] for measured in (first, second)),
        )
        shape = first.kl.shape
        return verdict.probability.numpy().reshape(shape), verdict.valid.numpy().reshape(shape)
    if first.score is None or second.score is None:
        return None
    return score_wins(first.score, second.score)


ARRAYS = ("ended", "score", "kl", "logp", "reference_logp", "entropy", "forward_kl")


def _plain(values: Array) -> list[list[float | None]]:
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]


def _array(rows: list[list[float | None]]) -> Array:
    return np.array(
        [[np.nan if value is None else value for value in row] for row in rows], dtype=float
    )
