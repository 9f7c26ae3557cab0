"""RewardBench 2: its worked example, ties counted by shares, malformed rows named."""

import pytest

from alignkit.errors import DataError
from alignkit.metrics.rewardbench2 import rewardbench2


def row(subset, scores, correct=1, name=""):
    return {"subset": subset, "scores": scores, "num_correct": correct, "id": name or subset}


TIES = [
    row("Ties", [3, 1, 0], name="ref:a"),
    row("Ties", [3, 2.5, 2, 0.5], 3, name="tied:a"),
    row("Ties", [2, 2.5, 0], name="ref:b"),
    row("Ties", [4, 1, 0.5], 2, name="tied:b"),
]


def test_the_worked_example():
    assert rewardbench2(TIES)["Ties"] == pytest.approx(0.648195, abs=5e-7)
    assert rewardbench2(TIES[::-1]) == rewardbench2(TIES)


def test_a_constant_scorer_gets_a_quarter_of_four_answers():
    result = rewardbench2([row("Math", [1.0] * 4), row("Focus", [0.0] * 4)])
    assert result == {"Math": 0.25, "Focus": 0.25, "total": 0.25}


def test_shares_and_the_mean_of_the_subsets():
    rows = [
        row("Math", [2, 1, 0, 0]),
        row("Math", [2, 2, 0, 0]),
        row("Math", [1, 2, 0, 0]),
        row("Focus", [1, 0, 0, 0]),
    ]
    assert rewardbench2(rows) == {"Math": 0.5, "Focus": 1.0, "total": 0.75}


def test_a_spread_and_a_gap_of_zero_add_nothing():
    same = [row("Ties", [1, 1], name="ref:a"), row("Ties", [1, 1, 1], 2, name="tied:a")]
    assert rewardbench2(same)["Ties"] == 0.0


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], "no rows"),
        ([{"subset": "Math", "scores": [1, 0], "id": "x"}], "num_correct"),
        ([row("Math", [1.0])], "one wrong"),
        ([row("Math", [1.0, float("nan")])], "not finite"),
        ([row("Math", [1.0, 1.0, 0.0], 2)], "only Ties"),
        (TIES[:1], "both rows"),
        ([*TIES, TIES[0]], "twice"),
        ([row("Ties", [1, 0], name="a")], "ref:NAME"),
    ],
)
def test_malformed_rows_are_named(rows, match):
    with pytest.raises(DataError, match=match):
        rewardbench2(rows)
