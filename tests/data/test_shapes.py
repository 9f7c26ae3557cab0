"""Rows that are brought into another shape: pairs as labelled completions, long rows cut."""

import pytest

from alignkit.data import DataConfig, load_bundles, load_prompts
from alignkit.errors import DataError

PAIRS = [{"prompt": f"hello {i}", "chosen": " world", "rejected": " there you"} for i in range(3)]
IMPLICIT = [{key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in PAIRS]


def texts(tokenizer, bundles):
    return [
        (tokenizer.decode(b.prompt), tokenizer.decode(b.completions[0]), bool(b.rows["label"]))
        for b in bundles
    ]


@pytest.mark.parametrize("rows", [PAIRS, IMPLICIT], ids=["explicit", "implicit"])
def test_pairs_become_labelled_completions_and_the_report_says_so(kinds, rows):
    tokenizer = kinds["byte_level"]
    config = DataConfig(append_eos=False)
    bundles, report = load_bundles(config, "labelled", tokenizer, source=rows)
    labelled = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in PAIRS
        for side in ("chosen", "rejected")
    ]
    expected, plain = load_bundles(config, "labelled", tokenizer, source=labelled)
    wanted = texts(tokenizer, expected)
    assert [p + c for p, c, _ in texts(tokenizer, bundles)] == [p + c for p, c, _ in wanted]
    assert [label for *_, label in texts(tokenizer, bundles)] == [True, False] * 3
    assert {b.uid for b in bundles} == {"rows:1", "rows:2", "rows:3"}
    assert (report.total, report.usable, report.count("unpaired")) == (3, 3, 3)
    assert plain.count("unpaired") == 0


def test_equal_answers_are_not_both_desirable_and_undesirable(kinds):
    rows = [*PAIRS, {"prompt": "a", "chosen": " b", "rejected": " b"}]
    bundles, report = load_bundles(DataConfig(), "labelled", kinds["byte_level"], source=rows)
    assert (len(bundles), report.count("identical")) == (6, 1)


@pytest.mark.parametrize("limit", [4, 6, 8, 12])
def test_the_prompt_makes_room_where_its_beginning_is_cut(kinds, limit):
    tokenizer = kinds["word_level"]
    row = {"prompt": "the cat sat on the mat", "chosen": " and looked", "rejected": " hello"}
    whole, _ = load_bundles(DataConfig(), "pair", tokenizer, source=[row])
    config = DataConfig(max_length=limit, truncate="start")
    (bundle,), report = load_bundles(config, "pair", tokenizer, source=[row])

    longest = len(whole[0].prompt) + max(map(len, whole[0].completions))
    cut = max(longest - limit, 0)
    assert bundle.prompt.tolist() == whole[0].prompt[cut:].tolist()
    assert [c.tolist() for c in bundle.completions] == [c.tolist() for c in whole[0].completions]
    assert report.count("truncated") == (cut > 0)


def test_a_completion_longer_than_the_limit_keeps_a_token_of_the_prompt(kinds):
    row = {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " hello there"}
    config = DataConfig(max_length=3, truncate="start")
    (bundle,), _ = load_bundles(config, "pair", kinds["word_level"], source=[row])
    decoded = [kinds["word_level"].decode(ids) for ids in (bundle.prompt, *bundle.completions)]
    assert decoded == ["cat", "sat on", "hello there"]


def test_long_prompts_of_online_objectives_are_cut_at_their_beginning(kinds):
    rows = [{"prompt": "the cat sat on the mat"}]
    with pytest.raises(DataError, match=r"data\.max_length=4"):
        load_prompts(DataConfig(max_length=4), kinds["word_level"], source=rows)
    config = DataConfig(max_length=4, truncate="start")
    (prompt,), report = load_prompts(config, kinds["word_level"], source=rows)
    assert kinds["word_level"].decode(prompt.ids) == "on the mat"
    assert report.count("truncated") == 1
