"""The world of reviews: its grammar, its reward, its files."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from alignkit.errors import ConfigError, ResourceError
from alignkit.tasks import TASKS, resolve, worker
from alignkit.tasks.base_model import word_tokenizer
from alignkit.tasks.reviews import REVIEWS


@pytest.fixture(params=sorted(REVIEWS))
def world(request):
    return REVIEWS[request.param]


def test_every_choice_of_words_is_one_review(world):
    assert len(world.rewards) == math.prod(len(slot.words) for slot in world.slots)
    assert len(set(world.prompts)) == len(world.genres) * len(world.subjects)
    longest = max(len(review.split()) for review in world.rewards)
    # cut at the cap, a text is longer than any review: the reward need not know whether it ended
    assert world.cap > longest + 1


def test_the_reward_is_the_sum_of_the_words_by_hand():
    world = REVIEWS["reviews"]
    texts = [
        " gripping story , wooden acting , weak ending",  # 1.2 - 0.6 - 0.6
        "solid story ,  plain acting , fair ending ",  # 0.2 - 0.2 + 0.2, odd spaces
        "hopeless story , awful acting , absurd ending",  # 3 * -1.2, the worst review
        "gripping story , wooden acting , weak",  # cut
        "gripping story , wooden acting , weak ending ending",
        "superb story , wooden acting , weak ending",  # a word in the wrong place
        "",
    ]
    assert world.reward(["p"] * 7, texts, other=[0] * 7) == pytest.approx(
        [0.0, 0.2, -3.6, -4.0, -4.0, -4.0, -4.0], abs=1e-12
    )


def test_outside_the_grammar_is_below_every_review(world):
    assert world.outside < min(world.rewards.values())


def test_the_corpus_is_repeatable_stays_in_the_grammar_and_uses_all_of_it(world):
    rows = list(world.corpus_rows(world.corpus))
    assert rows[:50] == list(world.corpus_rows(50))
    assert {row["completion"].strip() for row in rows} == set(world.rewards)
    assert Counter(row["prompt"] for row in rows) == dict.fromkeys(
        world.prompts, world.corpus // len(world.prompts)
    )


def test_texts_survive_the_tokenizer(world):
    tokenizer = word_tokenizer(world.vocabulary)
    # decoding without special tokens hides nothing but the end
    assert tokenizer.all_special_tokens == ["<eos>"]
    for text in [*world.prompts, *world.rewards]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert 1 not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer("nowhere")["input_ids"] == [1]


def test_whatever_shapes_the_files_changes_the_cache_key():
    world = REVIEWS["reviews_small"]
    changes = [
        {"outside": -5.0},
        {"pairs": 10},
        {"genres": ("comedy", "drama")},
        {"base": replace(world.base, steps=301)},
        {"slots": tuple(reversed(world.slots))},
        {"seed": 1},
    ]
    keys = {world.key, *(replace(world, **change).key for change in changes)}
    assert len(keys) == 1 + len(changes)


def test_rows_for_every_family(small, small_task):
    pairs, labelled = small_task.rows("pair"), small_task.rows("labelled")
    assert len(pairs) == small.pairs
    assert len(small_task.rows("pair", "eval")) == small.held_out
    assert [row["completion"] for row in labelled[:2]] == [pairs[0]["chosen"], pairs[0]["rejected"]]
    assert [row["label"] for row in labelled[:2]] == [True, False]
    assert {row["prompt"] for row in small_task.rows("rollout")} == set(small.prompts)
    assert set(small_task.rows("sequence")[0]) == {"prompt", "completion"}
    kind = [small_task.reward([], [row["completion"]])[0] for row in small_task.rows("sequence")]
    assert sum(kind) / len(kind) > 0.3  # the base's own mean is below 0


def test_pairs_carry_the_exact_reward_and_keep_what_is_outside_the_grammar(small, small_task):
    pairs = small_task.rows("pair")
    for side in ("chosen", "rejected"):
        assert [row[f"{side}_score"] for row in pairs] == small.reward(
            [], [row[side] for row in pairs]
        )
    assert any(row["rejected_score"] == small.outside for row in pairs)
    assert all(
        row["chosen"] != row["rejected"] and row["chosen"].strip() and row["rejected"].strip()
        for row in pairs
    )


def test_labels_are_bradley_terry(small_task):
    """The chosen one has the higher reward with probability sigmoid(gap), within 4 standard errors
    in every gap range.
    """
    pairs = small_task.rows("pair")
    gaps = [row["chosen_score"] - row["rejected_score"] for row in pairs]
    for low, high in ((0.1, 0.8), (0.8, 1.3), (1.3, 2.0), (2.0, 6.0)):
        found = [gap for gap in gaps if low <= abs(gap) < high]
        chances = [1 / (1 + math.exp(-abs(gap))) for gap in found]
        spread = math.sqrt(sum(p * (1 - p) for p in chances))
        assert abs(sum(gap > 0 for gap in found) - sum(chances)) < 4 * spread
        assert len(found) > 100


def test_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(
        ConfigError, match=r"there is no task `review`. Did you mean `reviews`\? Tasks: reviews, "
    ):
        resolve("task:review")


def test_naming_the_tasks_imports_no_torch():
    code = "import sys, alignkit.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "reviews" in TASKS


def test_a_task_is_made_outside_the_ranks_of_its_run(tmp_path, monkeypatch):
    seen = {}

    def run(command, env, **_):
        seen.update(env)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(worker.subprocess, "run", run)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("ALIGNKIT_KEPT", "yes")
    with pytest.raises(
        ResourceError,
        match=r"the task `reviews` could not be made \(its process ended with exit code 3\)",
    ):
        worker.run_apart("reviews", tmp_path)
    assert seen["ALIGNKIT_KEPT"] == "yes"
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} & set(seen)


def test_the_files_hold_one_json_object_per_line(small_task):
    for file in small_task.rows_folder.iterdir():
        assert all(isinstance(json.loads(line), dict) for line in file.read_text().splitlines())
