"""Parallel drafts, summary, refinement: exact by enumeration, and token by token with a model."""

import runpy
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from episode_worlds import loaded, player, prompts
from world import save_model

from alignkit.batches import Draw
from alignkit.sources.episodes import bundles_of

FILE = Path(__file__).resolve().parents[2] / "examples" / "drafts.py"
EXAMPLE = runpy.run_path(str(FILE))
Drafts = EXAMPLE["Drafts"]
LAW = dict(zip("abc", map(Fraction, ("1/2", "1/3", "1/6"))))


class Hidden(Drafts):
    """The right answer is b."""

    def accepts(self, text):
        return text == "b"


def expected_reward(summary, drafts):
    world = Hidden()
    world.drafts = drafts
    return EXAMPLE["expected_reward"](world, LAW, summary)


def test_a_draft_reads_nothing_and_the_last_answer_the_summary_alone():
    world = Hidden()
    world.reset(prompt="?")
    read = []
    for text in ("a", "b", "c", "b b"):
        assert world.step(text) == ("", 0.0, False)
        read.append(world.context())
    assert read == ["", "", "a=b=c=", "b b="]
    assert world.step("b") == ("", 1.0, True)


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_a_summary_that_finds_the_right_draft_is_best_of_n(drafts):
    best = expected_reward(lambda read: "b" if "b" in read else read[0], drafts)
    assert best == 1 - (1 - LAW["b"]) ** drafts
    assert expected_reward(lambda read: read[0], drafts) == LAW["b"]


def test_a_summary_that_counts_is_a_majority_vote():
    """Of three, b wins where it is said twice, or first of three that differ."""
    first, b, last = LAW["a"], LAW["b"], LAW["c"]
    twice = 3 * b**2 * (1 - b) + b**3
    assert expected_reward(lambda read: Counter(read).most_common(1)[0][0], 3) == (
        twice + 2 * first * b * last
    )


def test_what_it_prints(capsys):
    """Three drafts, of which 7 is right with probability 0.4: 1 - 0.6 ** 3 where it is always found."""
    EXAMPLE["main"]()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["1", "0.400", "0.400", "0.400"]
    assert lines[2] == ["3", "0.400", "0.424", "0.784"]


class Words(Drafts):
    """For the small model of the tests."""

    between = " w7"

    def step(self, text):
        _, reward, done = super().step(text)
        return "", reward, done

    def context(self):
        return "".join(f" {text} w7" for text in self._read())

    def _read(self):
        if len(self.said) < self.drafts:
            return []
        return self.said if len(self.said) == self.drafts else self.said[-1:]

    def accepts(self, text):
        return "w5" in text.split()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return loaded(save_model(tmp_path_factory.mktemp("drafts")))


@pytest.fixture(scope="module")
def played(models):
    """The episodes of three prompts that came to their end."""
    episodes = player(models, Words, cap=80).episodes(
        prompts(3), Draw(4), step=0, prompt_ids=range(3)
    )
    whole = [[e for e in row if e.ended and e.turns == Words.drafts + 2] for row in episodes]
    assert sum(map(len, whole)) > 4
    return whole


def ids_of(models, text):
    return models.tokenizer(text)["input_ids"]


def test_every_turn_is_drawn_in_its_own_context(models, played):
    """Five segments, no foreign tokens, and log-probs of exactly these contexts."""
    for prompt, row in zip(prompts(3), played):
        for episode in row:
            said = [message["content"] for message in episode.messages[::2]]
            drafts = "".join(f" {text} w7" for text in said[:3])
            wanted = [prompt.text] * 3 + [prompt.text + drafts, f"{prompt.text} {said[3]} w7"]
            contexts = [segment.prompt.tolist() for segment in episode.segments]
            assert contexts == [ids_of(models, text) for text in wanted]
            assert len({tuple(segment.ids.tolist()) for segment in episode.segments[:3]}) > 1

            for segment in episode.segments:
                assert segment.mask.all()
                whole = torch.cat([segment.prompt, segment.ids])
                with torch.no_grad():
                    laws = models.network(whole[None]).logits[0, :-1].log_softmax(-1)
                logps = laws.gather(-1, whole[1:, None])[len(segment.prompt) - 1 :, 0]
                torch.testing.assert_close(segment.logps, logps, atol=1e-5, rtol=0)
            assert episode.reward == float("w5" in said[4].split())


def test_the_drafts_of_all_episodes_are_one_bundle(played):
    row = played[0]
    bundles = bundles_of(prompts(1)[0], row, [e.reward for e in row], 0)
    drafts = next(b for b in bundles if torch.equal(b.prompt, prompts(1)[0].ids))
    assert len(drafts.completions) == Words.drafts * len(row)
    assert sum(len(bundle.completions) for bundle in bundles) == 5 * len(row)
    assert drafts.rows["segment"].tolist() == [0, 1, 2] * len(row)
