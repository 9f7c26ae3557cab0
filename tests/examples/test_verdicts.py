"""Decoding with verdicts, by enumeration: every sequence of answers is played, with its probability."""

import runpy
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
from episode_worlds import loaded, player, prompts
from world import save_model

from alignkit.batches import Draw

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "verdicts.py"
Verdicts = runpy.run_path(str(EXAMPLE))["Verdicts"]
ANSWERS = ("a", "b", "c", "d", "e")
LAW = dict(zip(ANSWERS, map(Fraction, ("1/10", "1/5", "3/10", "1/4", "3/20"))))


class Hidden(Verdicts):
    """The right answer is c."""

    def accepts(self, text):
        return text == "c"


def expected_reward(law, tries, price=0):
    """The exact mean reward of a policy: `law` gives an answer's chance after the wrong ones so far."""
    world = Hidden()
    world.tries, world.price = tries, price

    def value(wrong):
        total = Fraction(0)
        for answer in ANSWERS:
            chance = law(answer, wrong)
            if not chance:
                continue
            world.reset(prompt="?")
            for earlier in wrong:
                world.step(earlier)
            words, reward, done = world.step(answer)
            assert (words == world.wrong) == (not done)
            total += chance * (Fraction(reward) + (0 if done else value((*wrong, answer))))
        return total

    return value(())


def without(answer, wrong):
    """What a policy says that reads verdicts: its first law, without what was wrong already."""
    left = sum(LAW[a] for a in ANSWERS if a not in wrong)
    return 0 if answer in wrong else LAW[answer] / left


@pytest.mark.parametrize("tries", [1, 2, 4])
def test_a_policy_that_ignores_verdicts_is_best_of_n(tries):
    best_of_n = sum(
        Fraction("c" in drawn) * _chance(drawn) for drawn in product(ANSWERS, repeat=tries)
    )
    assert expected_reward(lambda answer, wrong: LAW[answer], tries) == best_of_n
    assert best_of_n == 1 - (1 - LAW["c"]) ** tries


def test_a_policy_that_reads_them_is_better_and_finds_every_answer_in_the_end():
    for tries in (2, 3, 4):
        assert expected_reward(without, tries) > 1 - (1 - LAW["c"]) ** tries
    assert expected_reward(without, len(ANSWERS)) == 1
    assert expected_reward(lambda a, wrong: Fraction(1, 5 - len(wrong)) * (a not in wrong), 3) == (
        Fraction(3, 5)
    )


def test_a_verdict_has_its_price():
    """Two answers: one verdict is paid where the first is wrong."""
    price = Fraction(1, 8)
    paid = (1 - LAW["c"]) * price
    assert expected_reward(without, 2, price) == expected_reward(without, 2) - paid


def _chance(drawn):
    chance = Fraction(1)
    for answer in drawn:
        chance *= LAW[answer]
    return chance


class Words(Verdicts):
    """For the small model of the tests: an answer is right when it says w5."""

    wrong = " w7"

    def accepts(self, text):
        return "w5" in text.split()


def test_a_model_is_told_and_goes_on_until_it_is_right(tmp_path):
    models = loaded(save_model(tmp_path / "model"))
    rows = player(models, Words).episodes(prompts(4), Draw(6), step=0, prompt_ids=range(4))
    episodes = [episode for row in rows for episode in row if episode.ended]
    assert {episode.reward for episode in episodes} == {0.0, 1.0}
    assert any(episode.turns > 1 and episode.reward for episode in episodes)
    for episode in episodes:
        assert episode.turns == Words.tries or episode.reward == 1
        (segment,) = episode.segments
        assert segment.ids[~segment.mask].eq(7).sum() == episode.turns - 1  # one verdict each
