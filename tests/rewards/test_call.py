"""One call of a reward for several completions of each prompt."""

from types import SimpleNamespace

import pytest

from alignkit.errors import DataError, NumericsError
from alignkit.rewards.call import call_reward


def prompt(text, **columns):
    return SimpleNamespace(text=text, columns=columns)


def recorded(scores):
    """A reward that returns `scores`, and the list of what it was called with."""
    calls = []

    def reward(prompts, completions, **columns):
        calls.append({"prompts": prompts, "completions": completions, **columns})
        return scores

    return reward, calls


def test_prompts_and_columns_are_repeated_for_each_completion():
    reward, calls = recorded([1.0, None, 3.0])
    prompts = [prompt("p", n=1, only_here="x"), prompt("q", n=2)]
    scores = call_reward(
        reward, prompts, [["a"], ["b", "c"]], [[[7]], [[8], [9, 9]]], trainer_state="state"
    )
    assert scores == [[1.0], [None, 3.0]]
    assert calls == [
        {
            "prompts": ["p", "q", "q"],
            "completions": ["a", "b", "c"],
            "completion_ids": [[7], [8], [9, 9]],
            "trainer_state": "state",
            "n": [1, 2, 2],
            "only_here": ["x", None, None],
        }
    ]


def test_a_trainer_state_that_nobody_has_is_not_handed_on():
    reward, calls = recorded([1.0])
    call_reward(reward, [prompt("p")], [["a"]], [[[7]]])
    assert "trainer_state" not in calls[0]


def test_without_completions_the_reward_is_not_called():
    reward, calls = recorded([])
    assert call_reward(reward, [prompt("p", n=1)], [[]], [[]]) == [[]]
    assert call_reward(reward, [], [], []) == []
    assert calls == []


def test_a_wrong_number_of_scores_is_refused():
    reward, _ = recorded([1.0])
    with pytest.raises(DataError, match="1 scores for 2 completions"):
        call_reward(reward, [prompt("p")], [["a", "b"]], [[[7], [8]]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 10**400, -(10**400), 1e101])
def test_scores_that_are_not_finite_name_the_reward_and_the_row(bad):
    def huge(prompts, completions, **columns):
        return [0.0, bad]

    with pytest.raises(NumericsError, match=r"reward huge gives (nan|-?inf) for row 1 of 2"):
        call_reward(huge, [prompt("p")], [["a", "b"]], [[[1], [2]]])
