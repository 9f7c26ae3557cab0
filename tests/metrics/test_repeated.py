"""Repeated sampling: the fitted curve, a verifier that errs, and the map of models, each against what
can be enumerated.
"""

from itertools import permutations, product
from math import comb

import numpy as np
import pytest

from alignkit.errors import ConfigError
from alignkit.metrics.completions import pass_at_k
from alignkit.metrics.repeated import (
    CoverageCurve,
    fit_coverage,
    model_map,
    verified_at_k,
    verified_in_the_limit,
)


def test_a_planted_curve_comes_back():
    planted = CoverageCurve(scale=1.7, rate=0.35)
    fitted = fit_coverage({k: planted.at(k) for k in (1, 2, 4, 8)})
    assert fitted.scale == pytest.approx(1.7, abs=1e-12)
    assert fitted.rate == pytest.approx(0.35, abs=1e-12)
    assert fit_coverage({1: 0.0, 2: 0.3, 4: 1.0}) is None


@pytest.mark.parametrize(("n", "k", "right"), [(4, 2, 1), (4, 4, 2), (3, 3, 3), (4, 3, 0)])
def test_the_verified_answer_by_enumeration(n, k, right):
    """All orders of the answers, and all verdicts on each."""
    accepted, refused = 0.3, 0.2
    total = 0.0
    orders = list(permutations([True] * right + [False] * (n - right)))
    for order in orders:
        for verdicts in product((True, False), repeat=k):
            chance = 1.0
            for is_right, verdict in zip(order, verdicts):
                accepts = 1 - refused if is_right else accepted
                chance *= accepts if verdict else 1 - accepts
            first = next((answer for answer, verdict in zip(order, verdicts) if verdict), False)
            total += chance * first / len(orders)
    figure = verified_at_k([right], n, k, wrongly_accepted=accepted, wrongly_refused=refused)
    assert figure == pytest.approx(total, abs=1e-14)


def test_a_perfect_verifier_is_pass_at_k_and_a_blind_one_is_chance():
    for k in (1, 3, 6):
        perfect = verified_at_k([2, 0, 6, 1], 6, k, wrongly_accepted=0.0)
        assert perfect == pytest.approx(pass_at_k([2, 0, 6, 1], 6, k), abs=1e-14)
        blind = verified_at_k([2, 0, 6, 1], 6, k, wrongly_accepted=1.0)
        assert blind == pytest.approx(9 / 24, abs=1e-14)


def test_it_is_unbiased_and_ends_at_its_limit():
    """Over binomial counts it is p (1 - (1 - q)^k) / q with q the chance of being accepted."""
    p, rate, n, k = 0.3, 0.25, 9, 4
    mean = sum(
        comb(n, c) * p**c * (1 - p) ** (n - c) * verified_at_k([c], n, k, wrongly_accepted=rate)
        for c in range(n + 1)
    )
    q = p + (1 - p) * rate
    assert mean == pytest.approx(p * (1 - (1 - q) ** k) / q, abs=1e-14)
    limit = verified_in_the_limit(p, wrongly_accepted=rate)
    assert limit == pytest.approx(p / q, abs=1e-15)
    assert verified_at_k([300], 1000, 60, wrongly_accepted=rate) == pytest.approx(limit, abs=1e-3)


def test_half_the_variance_is_the_kl_to_second_order():
    """On a law of six texts, all of which are seen in its shares: the error falls like the cube of the
    distance.
    """
    noise = np.random.default_rng(0)
    counts = np.array([1, 2, 3, 4, 5, 5])
    law = counts / counts.sum()
    texts = np.repeat(np.arange(6), counts)
    first, second = noise.standard_normal((2, 6))

    def error(step):
        one, two = (np.log(law) + step * direction for direction in (first, second))
        one, two = (values - np.log(np.exp(values).sum()) for values in (one, two))
        kl = float((np.exp(one) * (one - two)).sum())
        logps = {"one": one[texts][None], "two": two[texts][None] + 7.0}
        n = len(texts)
        return abs(model_map(logps)["one"]["two"] * (n - 1) / n - kl), kl

    (far, _), (near, kl) = error(0.1), error(0.01)
    assert near < far / 500
    assert near < 0.02 * kl


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ConfigError, match="rates in"):
        verified_at_k([1], 4, 2, wrongly_accepted=1.5)
    with pytest.raises(ConfigError, match="at least two texts"):
        model_map({"one": [[1.0]]})
