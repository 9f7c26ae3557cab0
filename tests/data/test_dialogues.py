"""Whole dialogues beside a prompt: what they share is the prompt, and nothing is said twice."""

import pytest

from alignkit.data import DataConfig, load_bundles
from alignkit.errors import DataError


def turns(*texts, first="user"):
    """Messages of alternating roles."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


SYSTEM = {"role": "system", "content": "Be brief."}
GREETING = {"role": "assistant", "content": "hello there"}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def texts(kinds):
    """Prompt and completions of a row as they are trained, read back from its tokens."""

    def read(row, family="pair"):
        config = DataConfig(chat_template=TEMPLATE)
        (bundle,), _ = load_bundles(config, family, kinds["chat"], source=[row])
        decode = kinds["chat"].decode
        for ids, mask in zip(bundle.completions, bundle.masks):
            assert mask.all() or len(ids) > 20  # short answers are trained whole
        return decode(bundle.prompt), [decode(ids) for ids in bundle.completions]

    return read


def dialogues(*shared):
    """A pair of dialogues that begin with the turns `shared`."""
    return {
        "chosen": [*shared, *turns("four", first="assistant")],
        "rejected": [*shared, *turns("five", first="assistant")],
    }


ANSWERS = ["four<|im_end|>", "five<|im_end|>"]


@pytest.mark.parametrize(
    ("prompt", "shared"),
    [
        ("2+2?", turns("2+2?")),
        (" 2+2?\n", turns("2+2?")),  # white space is no contradiction
        ("2+2?", turns("2+2? ")),
        ("2+2?", [SYSTEM, *turns("2+2?")]),
        ("Be brief.\n\n2+2?", [SYSTEM, *turns("2+2?")]),
        ("hello", turns("hello", "Hi", "2+2?")),  # the first question
        ("2+2?", turns("hello", "Hi", "2+2?")),  # or the last one
        ("hello", [SYSTEM, *turns("hello", "Hi", "2+2?")]),
        (
            "User: hello there\nBot: Hi, and welcome\nUser: What is 2+2?\nBot:",
            turns("hello there", "Hi, and welcome", "What is 2+2?"),
        ),
        ("", turns("hello", "Hi", "2+2?")),
        ("2+2?", [GREETING, *turns("2+2?")]),
        (turns("2+2?"), turns("2+2?")),
        (turns("2+2?"), [SYSTEM, *turns("2+2?")]),
        ([SYSTEM, *turns("2+2?")], [SYSTEM, *turns("2+2?")]),
        (turns("hello"), turns("hello", "Hi", "2+2?")),
        (turns("hello", "Hi", "2+2?"), turns("hello", "Hi", "2+2?")),
        ([GREETING, *turns("2+2?")], [GREETING, *turns("2+2?")]),
    ],
)
def test_the_shared_turns_are_the_prompt_and_stand_once(texts, prompt, shared):
    expected = "".join(f"[{m['role']}]{m['content']}<|im_end|>" for m in shared) + "[assistant]"
    pair = dialogues(*shared)
    assert texts({"prompt": prompt, **pair}) == (expected, ANSWERS)
    assert texts({"prompt": prompt, **pair}, "sequence") == (expected, ANSWERS[:1])

    # Keys that no template shows make no difference, wherever they stand.
    marked = [{**message, "name": None, "id": 7} for message in pair["chosen"]]
    assert texts({"prompt": prompt, **pair, "chosen": marked}) == (expected, ANSWERS)
    ranking = {"prompt": prompt, "ranking": [pair["chosen"], pair["rejected"]]}
    assert texts(ranking, "ranked") == (expected, ANSWERS)
    implicit = {**pair, "chosen": marked}
    assert texts(implicit) == (expected, ANSWERS)


@pytest.mark.parametrize("prompt", ["2+2?", turns("2+2?"), "hello 2+2?", "3+3?", turns("2+2? no")])
def test_a_prompt_that_contradicts_the_dialogues_is_refused_with_its_row(kinds, prompt):
    other = "1+1?" if prompt in ("2+2?", turns("2+2?")) else "2+2?"
    row = {"prompt": prompt, **dialogues(*turns(other))}
    for family in ("pair", "sequence"):
        with pytest.raises(
            DataError, match=r"contradicting_prompt: 1 row \(1\).*rows:1: the prompt is"
        ):
            load_bundles(DataConfig(), family, kinds["chat"], source=[row])
    for single in (
        {"prompt": prompt, "completion": row["chosen"]},
        {"prompt": prompt, "completion": row["chosen"], "label": True},
    ):
        family = "labelled" if "label" in single else "sequence"
        with pytest.raises(DataError, match="contradicting_prompt"):
            load_bundles(DataConfig(), family, kinds["chat"], source=[single])


@pytest.mark.parametrize("answer", ["five", turns("five", first="assistant")])
@pytest.mark.parametrize("prompt", ["2+2?", turns("2+2?")])
def test_a_dialogue_beside_an_answer_is_cut_behind_the_prompt(texts, answer, prompt):
    whole = [SYSTEM, *turns("2+2?", "four")]
    prompt_text = "[system]Be brief.<|im_end|>[user]2+2?<|im_end|>[assistant]"
    assert texts({"prompt": prompt, "chosen": whole, "rejected": answer}) == (prompt_text, ANSWERS)
    swapped = {"prompt": prompt, "chosen": answer, "rejected": whole}
    assert texts(swapped) == (prompt_text, ANSWERS[::-1])


@pytest.mark.parametrize("family", ["sequence", "labelled"])
def test_a_single_dialogue_is_cut_behind_the_turn_that_the_prompt_names(texts, family):
    dialogue = turns("hello", "Hi", "2+2?", "four")
    label = {"label": True} if family == "labelled" else {}
    first = texts({"prompt": "hello", "completion": dialogue, **label}, family)
    assert first[0] == "[user]hello<|im_end|>[assistant]"
    assert first[1] == ["Hi<|im_end|>[user]2+2?<|im_end|>[assistant]four<|im_end|>"]
    last = texts({"prompt": "2+2?", "completion": dialogue, **label}, family)
    assert last[1] == ["four<|im_end|>"]


def test_answers_of_several_turns_stay_completions(texts):
    """They begin with the assistant: the prompt column is all of the prompt."""
    row = {
        "prompt": "hello",
        "chosen": turns("Hi", "2+2?", "four", first="assistant"),
        "rejected": turns("Hi", "2+2?", "five", first="assistant"),
    }
    prompt, (chosen, _) = texts(row)
    assert prompt == "[user]hello<|im_end|>[assistant]"
    assert chosen == "Hi<|im_end|>[user]2+2?<|im_end|>[assistant]four<|im_end|>"
