"""The same row, written in other ways."""

import csv
import json

import datasets
import pytest

from alignkit.data import DataConfig, check, load_bundles, load_prompts
from alignkit.data.dialects import translated
from alignkit.data.verdicts import BadRow
from alignkit.errors import DataError

QUESTION = [{"role": "user", "content": "hello"}]
ANSWER = [{"role": "assistant", "content": "world"}]
OTHER = [{"role": "assistant", "content": "there"}]
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def read(kinds):
    """Prompt and completions of the only row as text, and the report."""

    def read_one(source, family="pair", **options):
        config = DataConfig(chat_template=TEMPLATE, **options)
        (bundle,), report = load_bundles(config, family, kinds["chat"], source=source)
        decode = kinds["chat"].decode
        return decode(bundle.prompt), [decode(ids) for ids in bundle.completions], report

    return read_one


PAIR = ("[user]hello<|im_end|>[assistant]", ["world<|im_end|>", "there<|im_end|>"])


@pytest.mark.parametrize("write", [json.dumps, lambda v: json.dumps(v, indent=1), repr])
def test_messages_as_text_in_a_csv_file_are_read_as_messages(tmp_path, read, write):
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "chosen", "rejected"])
        writer.writerow(map(write, (QUESTION, ANSWER, OTHER)))
    *texts, report = read(path)
    assert tuple(texts) == PAIR
    assert report.count("messages_as_text") == 1


def test_text_that_only_resembles_messages_stays_text_or_is_refused(kinds):
    for text in ('[{"name": "a"}]', '[{"role": "user"}]', "[1, 2]", '["role"]', '{"role": "x"}'):
        values, verdicts = translated({"prompt": text})
        assert (values["prompt"], verdicts) == (text, [])

    # What numpy's arrays print into CSV files: no commas between the messages.
    broken = "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]"
    with pytest.raises(
        BadRow, match="prompt looks like a list written as text, but it is not JSON"
    ):
        translated({"prompt": broken})


def test_sharegpt_conversations_are_dialogues(read):
    rows = [
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "hello"},
                {"from": "gpt", "value": "world"},
            ]
        }
    ]
    prompt, completions, report = read(rows, "sequence")
    assert prompt == "[system]Be brief.<|im_end|>[user]hello<|im_end|>[assistant]"
    assert completions == ["world<|im_end|>"]
    assert report.format == "messages"
    assert check(DataConfig(), source=rows)[1] is None

    # With preferences beside it the conversation is the prompt; answers may stand without a list.
    pair = {
        "conversations": [{"from": "human", "value": "hello"}],
        "chosen": {"from": "gpt", "value": "world"},
        "rejected": {"from": "gpt", "value": "there"},
    }
    assert read([pair])[:2] == PAIR
    mapped = {"talk": pair["conversations"], "chosen": ANSWER, "rejected": OTHER}
    assert read([mapped], columns={"prompt": "talk"})[:2] == PAIR


def test_sharegpt_tools(read):
    rows = [
        {
            "conversations": [
                {"from": "human", "value": "time?"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "noon"},
                {"from": "gpt", "value": "noon"},
            ],
            "tools": json.dumps([TOOL]),
        }
    ]
    prompt, (completion,), _ = read(rows, "sequence")
    assert prompt.endswith("[user]time?<|im_end|>[assistant]")
    assert prompt.startswith(json.dumps([TOOL]))
    call = json.dumps(CALL["function"])
    assert completion == f"{call}<|im_end|>[tool]noon<|im_end|>[assistant]noon<|im_end|>"
    with pytest.raises(DataError, match="role 'critic'; roles are"):
        read([{"conversations": [{"from": "critic", "value": "a"}]}], "sequence")


@pytest.mark.parametrize("form", ["absent", "null", "empty"])
@pytest.mark.parametrize("as_text", [False, True])
def test_tool_calls_need_no_content_and_tools_may_be_text(read, form, as_text):
    message = {"role": "assistant", "tool_calls": [CALL]}
    message |= {"absent": {}, "null": {"content": None}, "empty": {"content": ""}}[form]
    tools = json.dumps([TOOL]) if as_text else [TOOL]
    row = {"prompt": QUESTION, "chosen": [message], "rejected": OTHER, "tools": tools}
    prompt, (chosen, _), report = read([row])
    assert prompt == json.dumps([TOOL]) + "[user]hello<|im_end|>[assistant]"
    assert chosen == json.dumps(CALL["function"]) + "<|im_end|>"
    assert not report.findings


def test_tools_that_are_not_json_are_refused(read):
    row = {"prompt": QUESTION, "chosen": ANSWER, "rejected": OTHER, "tools": "clock()"}
    with pytest.raises(DataError, match="tools is a text that is not JSON, expected a list"):
        read([row])
    assert read([{**row, "tools": ""}])[:2] == PAIR


def test_nulls_that_arrow_adds_are_left_out_and_counted(tmp_path, kinds):
    """Two rows whose tools have different arguments: Arrow gives each the keys of both."""

    def row(name, arguments, properties):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        parameters = {"type": "object", "properties": properties}
        tool = {"type": "function", "function": {"name": name, "parameters": parameters}}
        chosen = [{"role": "assistant", "content": "", "tool_calls": [call]}]
        return {"prompt": QUESTION, "chosen": chosen, "rejected": OTHER, "tools": [tool]}

    rows = [
        row("weather", {"city": "Rome"}, {"city": {"type": "string"}}),
        row("clock", {"zone": "UTC", "form": 24}, {"zone": {"type": "string", "enum": ["UTC"]}}),
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    config = DataConfig(chat_template=TEMPLATE)
    expected, clean = load_bundles(config, "pair", kinds["chat"], source=rows)
    bundles, report = load_bundles(config, "pair", kinds["chat"], source=tmp_path / "a.parquet")
    assert clean.count("nulls_dropped") == 0
    assert report.count("nulls_dropped") == 2
    for ours, theirs in zip(bundles, expected):
        texts = [kinds["chat"].decode(ids) for ids in (ours.prompt, *ours.completions)]
        assert texts == [kinds["chat"].decode(ids) for ids in (theirs.prompt, *theirs.completions)]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"trainable": False}, {"weight": 0.0}])
def test_a_turn_of_weight_zero_is_no_completion(read, mark):
    dialogue = [*QUESTION, {**ANSWER[0], **mark}, *QUESTION, *OTHER]
    prompt, completions, _ = read([{"messages": dialogue}], "sequence")
    assert (
        prompt == "[user]hello<|im_end|>[assistant]world<|im_end|>[user]hello<|im_end|>[assistant]"
    )
    assert completions == ["there<|im_end|>"]

    # What follows the last turn that is trained is of no use.
    ended = [*QUESTION, *OTHER, *QUESTION, {**ANSWER[0], **mark}]
    assert read([{"messages": ended}], "sequence")[:2] == (PAIR[0], ["there<|im_end|>"])

    for rows, family in (
        ([{"messages": [*QUESTION, {**ANSWER[0], **mark}]}], "sequence"),
        ([{"prompt": QUESTION, "chosen": [{**ANSWER[0], **mark}], "rejected": OTHER}], "pair"),
    ):
        with pytest.raises(DataError, match=r"untrained: 1 row \(1\)"):
            read(rows, family)


@pytest.mark.parametrize("mark", [{"weight": 1}, {"trainable": True}, {"weight": None}])
def test_other_weights_are_trained_or_refused(read, mark):
    dialogue = [*QUESTION, {**ANSWER[0], **mark}]
    assert read([{"messages": dialogue}], "sequence")[:2] == (PAIR[0], ["world<|im_end|>"])
    with pytest.raises(DataError, match=r"a message of weight 0\.5; it is 0 or 1"):
        read([{"messages": [*QUESTION, {**ANSWER[0], "weight": 0.5}]}], "sequence")


def test_a_system_column_is_the_first_turn(read):
    row = {"system": "Be brief.", "prompt": "hello", "chosen": "world", "rejected": "there"}
    expected = ("[system]Be brief.<|im_end|>" + PAIR[0], PAIR[1])
    assert read([row])[:2] == expected
    assert read([{**row, "prompt": QUESTION}])[:2] == expected
    messages = {"system": "Be brief.", "messages": [*QUESTION, *ANSWER]}
    assert read([messages], "sequence")[:2] == (expected[0], PAIR[1][:1])

    # It may repeat the prompt's own system turn, but not contradict it.
    own = [{"role": "system", "content": "Be brief. "}, *QUESTION]
    assert read([{**row, "prompt": own}])[0].count("Be brief") == 1
    with pytest.raises(DataError, match="the column system and the prompt's system turn differ"):
        read([{**row, "system": "Be kind.", "prompt": own}])


@pytest.mark.parametrize(
    ("family", "row", "unused"),
    [
        ("pair", {"chosen": "hello world", "rejected": "hello there"}, 1),
        ("sequence", {"text": "hello world"}, 1),
        ("sequence", {"text": [*QUESTION, *ANSWER]}, 0),
        ("pair", {"chosen": [*QUESTION, *ANSWER], "rejected": [*QUESTION, *OTHER]}, 0),
    ],
)
def test_a_system_column_without_a_prompt_to_stand_before_is_a_warning(kinds, family, row, unused):
    config = DataConfig(chat_template=TEMPLATE)
    rows = [{"system": "Be brief."} | row]
    (bundle,), report = load_bundles(config, family, kinds["chat"], source=rows)
    assert report.count("system_unused") == unused
    text = kinds["chat"].decode([*bundle.prompt, *bundle.completions[0]])
    assert text.count("Be brief.") == 1 - unused
    assert len(report.warnings()) == unused


def test_rows_of_one_source_are_all_conversations_where_one_has_a_system_turn(kinds):
    config = DataConfig(chat_template=TEMPLATE)
    rows = [{"prompt": "hello", "system": "Be brief."}, {"prompt": "hello", "system": None}]
    prompts, report = load_prompts(config, kinds["chat"], source=rows)
    texts = [kinds["chat"].decode(prompt.ids) for prompt in prompts]
    assert texts == ["[system]Be brief.<|im_end|>" + PAIR[0], PAIR[0]]
    assert not report.findings


def test_without_a_chat_template_the_system_column_is_the_first_paragraph(kinds):
    rows = [{"system": "the cat", "prompt": "hello", "chosen": " world", "rejected": " there"}]
    (bundle,), _ = load_bundles(DataConfig(), "pair", kinds["byte_level"], source=rows)
    assert kinds["byte_level"].decode(bundle.prompt) == "the cat\n\nhello"


def test_plain_text_on_a_model_with_a_chat_template_is_noted(kinds):
    rows = [{"prompt": "hello", "chosen": " world", "rejected": " there"}]
    _, report = load_bundles(DataConfig(), "pair", kinds["chat"], source=rows)
    assert "plain text is read without the model's chat template" in "\n".join(report.lines())
    assert not report.warnings()
    _, report = load_bundles(DataConfig(), "pair", kinds["byte_level"], source=rows)
    assert report.count("plain_text") == 0


def test_columns_that_rewards_use_otherwise_are_withheld_and_noted(kinds):
    names = ("prompts", "completions", "completion_ids", "trainer_state")
    rows = [{"prompt": "hello", "answer": 1, **dict.fromkeys(names, "x")}] * 2
    prompts, report = load_prompts(DataConfig(), kinds["metaspace"], source=rows)
    assert [dict(prompt.columns) for prompt in prompts] == [{"answer": 1}] * 2
    assert report.count("reserved_column") == 2


@pytest.mark.parametrize("mark", [{"weight": 0}, {"trainable": False}])
def test_a_turn_of_weight_zero_between_others_is_masked(kinds, mark):
    dialogue = [*QUESTION, *ANSWER, *QUESTION, {**OTHER[0], **mark}, *QUESTION, *ANSWER]
    config = DataConfig(chat_template=TEMPLATE)
    rows = [{"messages": dialogue}]
    (bundle,), _ = load_bundles(config, "sequence", kinds["chat"], source=rows)
    trained = bundle.completions[0][bundle.masks[0]]
    assert kinds["chat"].decode(trained) == "world<|im_end|>" * 2
