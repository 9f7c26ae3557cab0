"""The arithmetic task: what is right, what the splits hold, what the base model can do."""

import pytest

from alignkit.rollout.generate import OneModel, generate
from alignkit.tasks import resolve
from alignkit.tasks.arithmetic import ARITHMETIC, CHARACTERS, answer, reward
from alignkit.tasks.base_model import character_tokenizer

SMALL, LARGE = ARITHMETIC["arithmetic_small"], ARITHMETIC["arithmetic"]


@pytest.mark.parametrize(
    ("prompt", "right"), [("47+85=", "231"), ("10+10=", "02"), ("99+99=", "891"), (" 3+4= ", "7")]
)
def test_answers_are_sums_in_reverse(prompt, right):
    assert answer(prompt) == right


@pytest.mark.parametrize(
    "prompt", ["", "47+85", "47-85=", "4a+5=", "1+2=3", "+=", "-1+2=", "__import__('os')+1="]
)
def test_what_is_no_sum_has_no_answer_and_no_reward(prompt):
    assert answer(prompt) is None
    assert reward([prompt], ["None"]) == [0.0]


def test_only_the_whole_answer_counts():
    completions = ["231", " 231 ", "2310", "132", "", "231=", "23"]
    assert reward(["47+85="] * 7, completions, uid=list(range(7))) == [
        1.0,
        1.0,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
    ]


def test_splits_are_disjoint_and_whole():
    for world, total in ((LARGE, 8100), (SMALL, 100)):
        parts = [set(prompts) for prompts in world.splits.values()]
        assert len(set.union(*parts)) == sum(map(len, parts)) == total
        assert [len(p) for p in parts[1:]] == [world.held_out] * 2
        assert all(answer(prompt) for part in parts for prompt in part)


def test_characters_are_tokens_and_come_back():
    tokenizer = character_tokenizer(CHARACTERS)
    ids = tokenizer("47+85=")["input_ids"]
    assert len(ids) == 6
    assert tokenizer.decode(ids) == "47+85="
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "47+85="
    assert tokenizer("4?")["input_ids"][1] == 1  # unknown


def test_the_small_base_model_is_right_sometimes_and_its_rows_are_the_splits():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = resolve("task:arithmetic_small")
    for split, prompts in SMALL.splits.items():
        assert [row["prompt"] for row in task.rows("rollout", split)] == prompts
        assert all(
            row["completion"] == answer(row["prompt"]) for row in task.rows("sequence", split)
        )
    models = OneModel(
        AutoModelForCausalLM.from_pretrained(task.model_folder),
        AutoTokenizer.from_pretrained(task.model_folder),
    )
    prompts = SMALL.splits["train"]
    answers = generate(models, prompts, completions=8, max_new_tokens=SMALL.cap)
    right = sum(sum(reward([prompt] * 8, texts)) for prompt, texts in zip(prompts, answers)) / (
        8 * len(prompts)
    )
    assert 0.2 < right < 0.6
