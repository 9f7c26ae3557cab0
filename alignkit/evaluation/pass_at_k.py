"""How often at least one of k answers is right."""

from collections.abc import Sequence
from math import comb

from alignkit.errors import ConfigError


def pass_at_k(correct: Sequence[int], n: int, k: int) -> float:
    """Mean over prompts of P(at least one of `k` answers is right), from `correct` right answers out of `n` per prompt.

    1 - C(n - c, k) / C(n, k): unbiased for 1 - (1 - p)^k, unlike the same with p replaced by c / n.
    Chen et al. 2021, arXiv:2107.03374, eq. 1. ConfigError unless 1 <= k <= n and every count is in [0, n].

    >>> pass_at_k([2], n=4, k=2)
    0.8333333333333334
    """
    if not correct or not 1 <= k <= n or any(not 0 <= c <= n for c in correct):
        raise ConfigError(
            f"pass_at_k: k {k}, n {n}, correct {list(correct)[:8]}; needs prompts, 1 <= k <= n and 0 <= correct <= n"
        )
    return sum(1 - comb(n - c, k) / comb(n, k) for c in correct) / len(correct)
