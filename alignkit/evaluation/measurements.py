"""What was measured of one model, sample by sample, and its summary: pure functions of arrays."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignkit.metrics.completions import distinct_n, score_wins
from alignkit.metrics.intervals import Array, Interval, known_mean, mean_interval, standard_error

BoolArray = NDArray[np.bool_]

ARRAYS = (
    "ended",
    "score",
    "kl",
    "logp",
    "reference_logp",
    "entropy",
    "forward_kl",
    "forward_logp",
    "kl_low",
    "sampled",
    "reward_calls",
    "turns",
    "read",
    "calls",
    "failures",
    "failed",
)


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
    # (Rao-Blackwellised); of a decoder whose KL is known as an interval its upper end
    kl: Array
    logp: Array | None  # log-prob under the policy; None for a decoder whose law is not known
    reference_logp: Array  # log-prob under the reference
    # of each token's distribution, summed along the sample: its mean is the entropy of the
    # completions; None as for `logp`
    entropy: Array | None
    # KL(reference || policy), the same way along the reference's samples
    forward_kl: Array | None = None
    forward_logp: Array | None = None  # log-prob under the policy of the reference's samples
    kl_low: Array | None = None  # the lower end, where the KL is known as an interval
    # The price of a completion: tokens computed for it (None: its own), texts the reward scored.
    sampled: Array | None = None
    reward_calls: Array | None = None
    # Of episodes of several turns, whose `texts` have one line per turn and whose `tokens` are those
    # that the policy has drawn.
    turns: Array | None = None  # of the policy
    read: Array | None = None  # all tokens after the prompt
    calls: Array | None = None  # of tools
    failures: Array | None = None  # calls that were answered by an error
    failed: Array | None = None  # 1 where an episode has no result; its other figures are nan

    def __post_init__(self) -> None:
        for name in ARRAYS:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, np.asarray(value, dtype=float))

    @property
    def log_ratio(self) -> Array | None:
        """The plain estimator of the KL (k1): log policy - log reference of each completion [P, K];
        None where the policy's log-probs are not known.
        """
        return None if self.logp is None else self.logp - self.reference_logp

    @property
    def lengths(self) -> Array:
        """Tokens of each completion [P, K], the end token included; nan for an episode that failed."""
        lengths = np.array([[len(ids) for ids in row] for row in self.tokens], dtype=float)
        return lengths if self.failed is None else np.where(self.failed == 1, np.nan, lengths)

    @property
    def distinct(self) -> dict[int, Array]:
        """distinct-1 and distinct-2 of each prompt's completions: n -> [P]."""
        return {n: np.array([distinct_n(row, n) for row in self.tokens]) for n in (1, 2)}

    def per_prompt(self) -> dict[str, Array]:
        """Every figure as means per prompt [P]: what the bootstrap works on."""
        lengths = self.lengths
        per_completion = {
            "score": self.score,
            "kl": self.kl,
            "kl_k1": self.log_ratio,
            "kl_low": self.kl_low,
            "forward_kl": self.forward_kl,
            "entropy": self.entropy,
            "length": lengths,
            "ended": self.ended,
            "sampled": lengths if self.sampled is None else self.sampled,
            "reward_calls": np.zeros_like(lengths)
            if self.reward_calls is None
            else self.reward_calls,
            "episodes/turns": self.turns,
            "episodes/length": self.read,
            "episodes/failed": self.failed,
            "tools/call_frequency": self.calls,
        }
        means = {
            name: known_mean(values)
            for name, values in per_completion.items()
            if values is not None
        }
        # Not a mean over completions: every token counts alike.
        means["kl_per_token"] = _ratio(self.kl, lengths)
        if self.calls is not None and self.failures is not None:
            means["tools/failure_frequency"] = _ratio(self.failures, self.calls)
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
        """Sampling error of the means on these very prompts: `score`, `kl`, `kl_low`, `kl_k1`,
        `forward_kl`.
        """
        sampled = {
            "score": self.score,
            "kl": self.kl,
            "kl_low": self.kl_low,
            "kl_k1": self.log_ratio,
            "forward_kl": self.forward_kl,
        }
        return {
            name: standard_error(values) for name, values in sampled.items() if values is not None
        }

    def dump(self) -> dict[str, Any]:
        """As JSON; `Measured.load` reads it back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ARRAYS:
            if values[name] is not None:
                values[name] = _rows_of(values[name])
        return values

    @classmethod
    def load(cls, values: Mapping[str, Any]) -> "Measured":
        """From what `dump` gave."""
        arrays = {name: _array(values[name]) for name in ARRAYS if values.get(name) is not None}
        return cls(**{**values, **arrays})


def wins(
    first: Measured, second: Measured, judge: Callable[..., Any] | None = None
) -> tuple[Array, BoolArray] | None:
    """P(the first's completion beats the second's under the same noise) and whether that verdict is
    valid: [P, K] each.

    By `judge` (alignkit.judges: symmetrised over both orders), else by the score: the higher wins.
    None without either.
    """
    if judge is not None:
        prompts = [prompt for prompt, row in zip(first.prompts, first.texts) for _ in row]
        verdict = judge(prompts, _flat(first.texts), _flat(second.texts))
        shape = first.kl.shape
        return verdict.probability.numpy().reshape(shape), verdict.valid.numpy().reshape(shape)

    if first.score is None or second.score is None:
        return None
    return score_wins(first.score, second.score)


def _ratio(numerators: Array, denominators: Array) -> Array:
    """Of the sums over each prompt's completions: [P, K] x2 -> [P], nan where there is nothing."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nansum(numerators, 1) / np.nansum(denominators, 1))


def _flat(texts: list[list[str]]) -> list[str]:
    return [text for row in texts for text in row]


def _rows_of(values: Array) -> list[list[float | None]]:
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]


def _array(rows: list[list[float | None]]) -> Array:
    return np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=float)
