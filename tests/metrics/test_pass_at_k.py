"""pass@k: unbiased for every probability, equal to the mean over all subsets."""

from itertools import combinations
from math import comb

import pytest

from alignkit.errors import ConfigError
from alignkit.metrics.completions import pass_at_k


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.93, 1.0])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (8, 1), (8, 3), (8, 8), (16, 8)])
def test_unbiased(n, k, p):
    mean = sum(comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k([c], n, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-14)


def test_it_is_the_mean_over_all_subsets_and_prompts():
    answers = [[1, 0, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    subsets = [
        [any(row[i] for i in chosen) for chosen in combinations(range(5), 3)] for row in answers
    ]
    wanted = sum(sum(row) / len(row) for row in subsets) / 3
    assert pass_at_k([sum(row) for row in answers], 5, 3) == pytest.approx(wanted, abs=1e-15)


@pytest.mark.parametrize(
    ("correct", "n", "k"), [([], 4, 1), ([1], 4, 5), ([1], 4, 0), ([5], 4, 1), ([-1], 4, 1)]
)
def test_impossible_counts_are_refused(correct, n, k):
    with pytest.raises(ConfigError, match=r"1 <= k <= n"):
        pass_at_k(correct, n, k)
