"""The cyclic task: its table is a game without a best review, and its judge reads from it."""

import torch

from alignkit.oracles import duality_gap, regularized_nash
from alignkit.tasks.cyclic import OUTSIDE, STRENGTH, CyclicJudge, preference_table, styles
from alignkit.tasks.reviews import REVIEWS

SMALL = REVIEWS["reviews_small"]


def test_every_part_has_a_style():
    assert len(found := styles(SMALL)) == 16
    assert found["gripping story , superb acting"] == [0, 0]
    assert found["hopeless story , wooden acting"] == [2, 1]
    counts = torch.tensor(list(styles(REVIEWS["reviews"]).values())).flatten().bincount()
    assert counts.tolist() == [216, 216, 216]  # the three styles are equally many


def test_preferences_go_round():
    table, names = preference_table("reviews_small"), list(SMALL.rewards)
    assert table.shape == (17, 17)
    assert (table + table.T - 1).abs().max() < 1e-15
    glowing, even, harsh = (
        names.index(f"{a} story , {b} acting")
        for a, b in (("gripping", "superb"), ("thin", "wooden"), ("hopeless", "awful"))
    )
    odds = torch.tensor(2 * STRENGTH, dtype=torch.float64)
    for winner, loser in ((glowing, even), (even, harsh), (harsh, glowing)):
        torch.testing.assert_close(table[winner, loser], odds.sigmoid())
    torch.testing.assert_close(
        table[:-1, -1], torch.full((16,), OUTSIDE, dtype=torch.float64).sigmoid()
    )


def test_the_equilibrium_is_a_mixture():
    table = preference_table("reviews")
    reference = torch.full((len(table),), 1 / len(table), dtype=torch.float64)
    nash = regularized_nash(table, reference, 0.05)
    assert nash[:-1].max() < 2 / 216  # no review is the best
    assert nash[-1] < 1e-3
    best = torch.zeros_like(nash)
    best[0] = 1.0
    assert duality_gap(table, reference, best, 0.05) > 0.5


def test_the_judge_reads_the_table():
    judge = CyclicJudge("reviews_small")
    first = [
        "gripping story , superb acting",
        " gripping  story , superb acting ",
        "no review at all",
    ]
    second = [
        "thin story , wooden acting",
        "gripping story , superb acting",
        "thin story , wooden acting",
    ]
    verdict, swapped = judge(["p"] * 3, first, second), judge(["p"] * 3, second, first)
    assert verdict.valid.all()
    expected = torch.tensor([2 * STRENGTH, 0.0, -OUTSIDE], dtype=torch.float64).sigmoid()
    torch.testing.assert_close(verdict.probability, expected)
    torch.testing.assert_close(
        verdict.probability + swapped.probability, torch.ones(3, dtype=torch.float64)
    )
