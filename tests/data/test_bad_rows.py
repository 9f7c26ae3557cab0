"""Bad input: what each row is told, and with which exit code it stops. Numbers are those of the
table of bad inputs.
"""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.data import DataConfig, check, load_bundles, load_prompts
from alignkit.data.verdicts import VERDICTS
from alignkit.errors import AlignkitError, ConfigError, DataError, ModelError

GOOD = [{"prompt": f"hello {i}", "chosen": " world", "rejected": " there"} for i in range(3)]


@pytest.fixture
def refused(kinds):
    """The message that stops a run on rows that are refused, with exit code 3."""

    def message(rows, family="pair", tokenizer="metaspace", **options):
        with pytest.raises(DataError) as caught:
            load_bundles(DataConfig(**options), family, kinds[tokenizer], source=rows)
        assert caught.value.exit_code == 3
        return str(caught.value)

    return message


def row(**changes):
    return {"prompt": "hello", "chosen": " world", "rejected": " there"} | changes


def test_1_an_empty_dataset_names_source_and_split(refused, write):
    path = write()
    assert f"{path} has 0 rows" in refused(path)
    assert "the given rows has 0 rows" in refused([])


def test_2_a_missing_column_lists_columns_and_the_nearest_mapping(refused):
    message = refused([{"prompt": "a", "chosen": "b", "response_rejected": "c"}])
    assert (
        "the columns are prompt, chosen, response_rejected; needed are preference pairs" in message
    )
    assert "try data.columns.rejected=response_rejected" in message
    mapped = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    renamed = [{mapped[key]: value for key, value in GOOD[0].items()}]
    expected = "try data.columns.prompt=question data.columns.chosen=good data.columns.rejected=bad"
    assert expected in refused(renamed)
    partly = refused([GOOD[0], {"prompt": "a", "chosen": "b"}])  # there, but not in every row
    assert "1 of 2 rows are malformed" in partly
    assert "missing: 1 row (2)" in partly
    assert "no `rejected` among prompt, chosen" in partly


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (row(chosen=None), "null: 1 row (4): a needed value is null; rows:4: chosen is null"),  # 3
        (row(prompt=None), "rows:4: prompt is null"),  # 4
        (
            row(chosen="", rejected=" "),
            "both_empty: 1 row (4): chosen and rejected are both empty",
        ),  # 6
        (
            row(chosen=7),
            "type: 1 row (4): a value has the wrong type; rows:4: chosen is int (7), expected a text",
        ),  # 14
        (
            row(chosen=["a"]),
            'chosen is a list with str; messages look like [{"role": "user", "content": "..."}',
        ),  # 15
        (
            row(chosen=[{"speaker": "gpt", "words": "a"}]),
            "chosen is a list with the keys speaker, words; messages look like",
        ),  # 15
        (
            row(chosen=[{"role": "bot", "content": "a"}]),
            "role 'bot'; roles are system, developer, user, assistant",
        ),  # 16
        (
            row(chosen=[{"role": "user", "content": "a"}]),
            "chosen ends with a user turn; it has to end with an assistant",
        ),  # 16
        (
            row(prompt=[{"role": "assistant", "content": "a"}]),
            "the prompt ends with an assistant turn",
        ),  # 16
        (
            row(chosen=[{"role": "assistant", "content": 1}]),
            "a message whose content is int, expected a text",
        ),
        (row(chosen=[{"role": "assistant", "content": None}]), "a message whose content is null"),
        (
            row(rejected="ab\ud800"),
            "not valid Unicode; rows:4: rejected holds the lone surrogate U+D800 at character 3",  # 17
        ),
        (row(chat_template_kwargs="x"), "chat_template_kwargs is str, expected an object"),
    ],
)
def test_malformed_rows_stop_the_run_or_are_dropped_and_counted(refused, kinds, bad, expected):
    message = refused([*GOOD, bad])
    assert message.startswith(
        "the given rows: 1 of 4 rows are malformed; correct them, or drop and count them"
    )
    assert expected in message
    bundles, report = load_bundles(
        DataConfig(on_bad_row="drop"), "pair", kinds["chat"], source=[*GOOD, bad]
    )
    assert (len(bundles), report.usable, report.total) == (3, 3, 4)
    assert sum(found.count for found in report.errors().values()) == 1


def test_dropping_every_row_is_refused_with_the_reasons(refused):
    message = refused([row(chosen=1), row(chosen="")], on_bad_row="drop")
    assert message.startswith("the given rows: none of 2 rows can be used")
    assert "type: 1 row (1)" in message
    assert "empty: 1 row (2)" in message


@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_5_an_empty_completion_is_dropped_and_counted(kinds, column):
    bundles, report = load_bundles(
        DataConfig(), "pair", kinds["metaspace"], source=[*GOOD, row(**{column: " "})]
    )
    assert len(bundles) == 3
    assert report.findings["empty"].rows == [4]
    assert f"empty: 1 row (4): an empty completion; rows:4: {column}" in "\n".join(report.lines())


def test_8_equal_completions_are_dropped_and_stop_the_run_above_half(refused, kinds):
    same = row(rejected=" world")
    bundles, report = load_bundles(
        DataConfig(), "pair", kinds["metaspace"], source=[*GOOD, same, same, same]
    )
    assert (len(bundles), report.share("identical")) == (3, 0.5)
    assert "chosen equals rejected in 57% of 7 rows" in refused([*GOOD, same, same, same, same])


def test_9_duplicates_and_contradictions_are_reported_and_kept(kinds):
    swapped = GOOD[0] | {"chosen": " there", "rejected": " world"}
    bundles, report = load_bundles(
        DataConfig(), "pair", kinds["metaspace"], source=[*GOOD, GOOD[1], swapped]
    )
    assert len(bundles) == 5
    assert report.findings["duplicate"].rows == [4]
    assert report.findings["contradictory"].rows == [5]
    assert (
        "contradictory: 1 row (5): the same pair occurs with chosen and rejected swapped, "
        "or a completion with both labels (20.0% of rows)" in report.warnings()[0]
    )


@pytest.mark.parametrize("labels", [(1, 1, 1), (0, 0, 0), (1, 1, 0)])
def test_labels_of_one_kind_are_a_warning(kinds, labels):
    rows = [{"prompt": "hello", "completion": f" w{i}", "label": x} for i, x in enumerate(labels)]
    report = load_bundles(DataConfig(), "labelled", kinds["metaspace"], source=rows)[1]
    assert report.count("one_label") == (3 if len(set(labels)) == 1 else 0)


def test_9_a_completion_with_both_labels_is_contradictory(kinds):
    rows = [{"prompt": "hello", "completion": " world", "label": label} for label in (1, 0, True)]
    report = load_bundles(DataConfig(), "labelled", kinds["metaspace"], source=rows)[1]
    assert report.findings["contradictory"].rows == [2, 3]
    assert report.findings["duplicate"].rows == [3]


def test_11_all_rows_too_long_give_a_histogram_and_a_value_that_works(refused, kinds):
    rows = [row(prompt="the cat sat on the mat " * (1 + i % 3)) for i in range(30)]
    message = refused(rows, max_length=4)
    assert "every usable row is longer than data.max_length=4" in message
    assert "9 - 16           10 ###############\n" in message
    suggested = int(message.rsplit("data.max_length=", 1)[1].split(",")[0])
    bundles, report = load_bundles(
        DataConfig(max_length=suggested), "pair", kinds["metaspace"], source=rows
    )
    assert len(bundles) == 30
    assert report.count("truncated") <= 0.05 * 30


@pytest.mark.parametrize("length", [1, 0, -5])
def test_13_a_max_length_that_holds_no_completion_is_a_config_error(length):
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        DataConfig(max_length=length)


def test_19_damaged_lines_are_named_by_file_and_line(refused, write, kinds):
    path = write(*GOOD)
    with open(path, "a") as file:
        file.write('{"prompt": "a", "cho\n' + json.dumps(GOOD[0]) + "\r\n")
    message = refused(path)
    assert "unreadable: 1 row (4)" in message
    assert "rows.jsonl:4: Unterminated string starting at at column 17" in message
    bundles, report = load_bundles(
        DataConfig(train=path, on_bad_row="drop"), "pair", kinds["metaspace"]
    )
    assert [b.uid for b in bundles] == [f"rows.jsonl:{n}" for n in (1, 2, 3, 5)]
    assert report.count("unreadable") == 1
    only_bad = write("a", 1, name="bad.jsonl")
    assert "2 of 2 rows are malformed" in refused(only_bad)


def test_20_implicit_prompts_without_a_common_beginning(refused, kinds):
    apart, together = (
        {"chosen": "hello world", "rejected": "the cat"},
        {"chosen": "hello world", "rejected": "hello there"},
    )
    _, report = load_bundles(DataConfig(), "pair", kinds["metaspace"], source=[apart, together])
    assert "no_common_prefix: 1 row (1)" in report.warnings()[0]
    assert "(50.0% of rows)" in report.warnings()[0]
    message = refused([apart, apart])
    assert (
        "share no beginning in any row; if there is no prompt, give the rows an empty `prompt`"
        in message
    )
    chats = [{key: [{"role": "assistant", "content": value}] for key, value in apart.items()}]
    assert "share no beginning in any row" in refused(chats, tokenizer="chat")


def test_28_a_tokenizer_without_chat_template(kinds):
    chats = [row(chosen=[{"role": "assistant", "content": "a"}])]
    with pytest.raises(ModelError, match="no chat template") as caught:
        load_bundles(DataConfig(), "pair", kinds["metaspace"], source=chats)
    assert caught.value.exit_code == 4


FAMILIES = {
    "pair": GOOD[0],
    "sequence": {"prompt": "a", "completion": "b"},
    "labelled": {"prompt": "a", "completion": "b", "label": True},
}


def test_a_family_fed_with_the_wrong_data_names_columns_needs_and_what_they_suit(refused, kinds):
    message = refused([FAMILIES["sequence"]], "pair")
    assert "the columns are prompt, completion; needed are preference pairs" in message
    assert "these rows suit sft" in message
    assert "needed are labelled completions: columns prompt, completion and label" in refused(
        [FAMILIES["sequence"]], "labelled"
    )
    assert "sft would learn the undesirable ones too" in refused([FAMILIES["labelled"]], "sequence")
    assert "data.format=text needs text" in refused([FAMILIES["pair"]], "sequence", format="text")
    assert "data.format=completion cannot serve this objective" in refused(
        [FAMILIES["sequence"]], "pair", format="completion"
    )
    with pytest.raises(ConfigError, match="no family `paris`; it is one of pair, sequence"):
        check(DataConfig(), family="paris", source=GOOD)
    everything = DataConfig(format="completion")
    bundles, _ = load_bundles(
        everything, "sequence", kinds["metaspace"], source=[FAMILIES["labelled"]]
    )
    assert len(bundles) == 1
    # sft takes the chosen of pairs
    bundles, report = load_bundles(DataConfig(), "sequence", kinds["metaspace"], source=GOOD)
    assert report.format == "pair"
    assert [kinds["metaspace"].decode(b.completions[0]) for b in bundles] == ["world</s>"] * 3
    with pytest.raises(
        DataError, match=r"needed are prompts: a column prompt; .*try data.columns.prompt=question"
    ):
        load_prompts(DataConfig(), kinds["metaspace"], source=[{"question": "a"}])


def test_the_format_comes_from_all_rows(kinds, refused):
    """The first row alone would be read as an implicit pair, and its null prompt column as no
    column.
    """
    rows = [{"prompt": None, "chosen": "a b", "rejected": "a c"}, GOOD[0]]
    assert "rows:1: prompt is null" in refused(rows)
    _, report = load_bundles(DataConfig(), "pair", kinds["metaspace"], source=rows[:1])
    assert report.format == "implicit_pair"


def test_pairs_that_repeat_the_prompt_are_noticed(kinds):
    rows = [row(chosen="hello world", rejected="hello there")]
    _, report = load_bundles(DataConfig(), "pair", kinds["metaspace"], source=rows)
    assert "data.format=implicit_pair reads it once" in report.warnings()[0]
    bundles, report = load_bundles(
        DataConfig(format="implicit_pair"), "pair", kinds["metaspace"], source=rows
    )
    assert kinds["metaspace"].decode(bundles[0].completions[0]) == "world</s>"
    assert not report.findings


def test_check_reports_without_raising(write, kinds):
    path = write(*GOOD, row(chosen=None), row(rejected=" world"), GOOD[0])
    for tokenizer in (None, kinds["metaspace"]):
        report, error = check(DataConfig(), tokenizer, source=path)
        assert (report.total, report.usable) == (6, 4)
        assert "1 of 6 rows are malformed" in str(error)
        lines = report.lines()
        assert lines[0] == f"{path}: 6 rows read, 4 kept, format pair"
        assert [line.split()[:3] for line in lines[1:4]] == [
            ["error", "1", "null:"],
            ["dropped", "1", "identical:"],
            ["note", "1", "duplicate:"],
        ]
        assert any("tokens: prompt median" in line for line in lines) == (tokenizer is not None)
    report, error = check(DataConfig(on_bad_row="drop"), source=path)
    assert error is None
    assert report.table().row_count == 3
    report, error = check(DataConfig(), kinds["metaspace"], source=[{"prompt": "a [b]"}])
    assert (report.format, report.usable, error) == ("prompt", 1, None)


def test_checking_text_needs_neither_torch_nor_datasets(write):
    code = (
        "import sys; from alignkit.data import DataConfig, check\n"
        f"report, error = check(DataConfig(), source={write(*GOOD)!r}); assert error is None; report.table()\n"
        "assert not {'torch', 'datasets', 'transformers', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text"]), inner)
    ),
    max_leaves=6,
)
WORDS = st.sampled_from(
    ["", " ", "hello", " world", "hello world", "<|im_end|>", "a</think>b", "\udfff"]
) | st.text(max_size=5)
ROLES = st.sampled_from(["user", "assistant", "assistant", "system", "tool", "bot"])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": WORDS}), min_size=1, max_size=4
)
SHAPES = [
    ("pair", ("prompt", "chosen", "rejected")),
    ("pair", ("chosen", "rejected")),
    ("sequence", ("prompt", "completion")),
    ("sequence", ("messages",)),
    ("sequence", ("chosen", "rejected")),
    ("labelled", ("prompt", "completion", "label")),
]


@st.composite
def sources(draw):
    """Rows of one shape, mostly plausible, some broken."""
    family, names = draw(st.sampled_from(SHAPES))
    cell = dict.fromkeys(names, WORDS | MESSAGES | MESSAGES | VALUES) | (
        {"label": st.booleans()} if "label" in names else {}
    )
    rows = st.fixed_dictionaries(cell, optional={"tools": VALUES, "chat_template_kwargs": VALUES})
    return family, draw(st.lists(rows | rows | rows | VALUES, min_size=1, max_size=4))


@settings(max_examples=200, deadline=None)
@given(sources(), st.sampled_from([6, 30, 200]))
def test_any_rows_are_bundles_or_an_error_of_ours(kinds, source, max_length):
    """Fuzz: nothing dies mid-way, and every row is either kept or counted."""
    family, rows = source
    config = DataConfig(on_bad_row="drop", max_length=max_length)
    try:
        bundles, report = load_bundles(config, family, kinds["chat"], source=rows)
    except AlignkitError:
        return
    left = sum(
        report.count(name)
        for name, (severity, _) in VERDICTS.items()
        if severity in ("error", "dropped")
    )
    assert len(bundles) == report.usable == report.total - left
    for bundle in bundles:
        assert len(bundle.prompt)
        assert all(
            mask.any() and len(mask) == len(ids)
            for ids, mask in zip(bundle.completions, bundle.masks)
        )
        assert max(len(bundle.prompt) + len(ids) for ids in bundle.completions) <= max_length


@pytest.mark.parametrize("declared", [True, False])
def test_words_that_the_tokenizer_does_not_know_are_counted(kinds, refused, monkeypatch, declared):
    if not declared:
        monkeypatch.setitem(kinds["word_level"]._special_tokens_map, "unk_token", None)
        assert kinds["word_level"].unk_token is None
    known = row(prompt="hello", chosen=" world", rejected=" there")
    foreign = row(prompt="hello", chosen=" zebra world", rejected=" there")
    report = load_bundles(DataConfig(), "pair", kinds["word_level"], source=[known, foreign])[1]
    assert report.findings["unknown_tokens"].rows == [2]

    lost = row(prompt="hello", chosen=" zebra", rejected=" giraffe")
    message = refused([lost], tokenizer="word_level")
    assert "chosen equals rejected in 100% of 1 rows (their tokens are equal" in message
    assert "words that the tokenizer does not know" in message


def test_tools_that_are_no_list_are_of_the_wrong_type(refused):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "hello"}]
    message = refused([{"messages": chat, "tools": 5}], "sequence", "chat")
    assert "tools is int, expected a list" in message
