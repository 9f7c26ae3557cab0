"""The limits of chat templates, and the date that they print."""

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
import torch
from transformers import LlamaConfig

from alignkit.data import DataConfig, load_bundles, template
from alignkit.data.template import ChatTemplate, given_template
from alignkit.data.template_time import with_time
from alignkit.errors import ConfigError, DataError, ModelError
from alignkit.rewards.model import TextScorer
from alignkit.rollout.generate import prompt_ids

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "hello"}]}
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DATED = (
    "<|im_start|>{{ strftime_now('%d %b %Y') }}{{ strftime_now(\"%H:%M\") }}<|im_end|>"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHANGELESS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load(tokenizer, **options):
    return load_bundles(DataConfig(**options), "sequence", tokenizer, source=[ROW])[0][0]


def test_a_template_that_does_not_end_is_stopped(kinds, monkeypatch):
    monkeypatch.setattr(template, "MAX_SECONDS", 0.2)
    with pytest.raises(ConfigError, match=r"data.chat_template runs for more than 0 s on one conv"):
        load(kinds["chat"], chat_template=ENDLESS)
    monkeypatch.setattr(kinds["chat"], "chat_template", ENDLESS)
    with pytest.raises(ModelError, match="the tokenizer's chat template runs for more than"):
        load(kinds["chat"])


@pytest.mark.parametrize("text", ["{{ 'x' * 30000000 }}", "{{ 'xy' * 10 ** 19 }}"])
def test_a_template_that_writes_too_much_is_refused(kinds, text):
    with pytest.raises(ConfigError, match=r"makes 30,000,000 characters|does not come to an end"):
        load(kinds["chat"], chat_template=text)


def test_a_template_that_calls_itself_for_ever_is_refused(kinds):
    endless = "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}"
    with pytest.raises(ConfigError, match=r"does not come to an end \(RecursionError\)"):
        load(kinds["chat"], chat_template=endless)


def test_other_threads_have_the_same_limits(kinds, monkeypatch):
    """Signals reach the main thread alone; a notebook's executor is another."""
    with ThreadPoolExecutor(1) as elsewhere:
        assert elsewhere.submit(load, kinds["chat"], chat_template=DATED).result()
        monkeypatch.setattr(template, "MAX_SECONDS", 0.2)
        endless = elsewhere.submit(load, kinds["chat"], chat_template=ENDLESS)
        with pytest.raises(ConfigError, match="runs for more than 0 s on one conversation"):
            endless.result(timeout=20)


def test_files_that_are_no_templates_are_refused(tmp_path):
    (tmp_path / "big.jinja").write_text("x" * (1 << 20) + "x")
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe{{ x }}")
    with pytest.raises(ConfigError, match="has 1,048,577 bytes; a template may have 1,048,576"):
        given_template(DataConfig(chat_template=str(tmp_path / "big.jinja")))
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        given_template(DataConfig(chat_template=str(tmp_path / "binary.jinja")))


def test_the_date_that_a_template_prints_is_the_recipes(kinds, monkeypatch):
    tokenizer = kinds["chat"]
    given = load(tokenizer, chat_template=DATED, template_time="2025-03-04T05:06")
    assert tokenizer.decode(given.prompt).startswith("<|im_start|>04 Mar 202505:06<|im_end|>")
    monkeypatch.setattr(tokenizer, "chat_template", DATED)
    own = load(tokenizer, template_time="2025-03-04T05:06")
    assert own.prompt.tolist() == given.prompt.tolist()
    assert load(tokenizer).prompt.tolist() != given.prompt.tolist()


@pytest.mark.parametrize(
    "call",
    [
        "{% set f = '%d ' ~ '%b' %}{{ strftime_now(f) }}",
        "{% macro today(f) %}{{ strftime_now(f) }}{% endmacro %}{{ today('%d %b') }}",
        "{{ strftime_now(format='%d %b') }}",
        "{{ strftime_now(date_format | default('%d %b')) }}",
        "  {% if strftime_now is defined %}{{ strftime_now('%d') | int }} Mar{% endif %}",
    ],
)
def test_the_clock_is_the_recipes_however_a_template_asks(kinds, call):
    shown = []
    for time in ("2025-03-14T05:06", "2025-03-14"):
        config = DataConfig(chat_template=call, template_time=time)
        shown.append(ChatTemplate(kinds["chat"], config).text(ROW["messages"], {}))
    assert shown == ["14 Mar", "14 Mar"]


def test_the_clock_writes_every_directive_as_python_does(kinds):
    now = datetime(2025, 3, 4, 5, 6, 7)
    letters = "aAbBcdDeFgGHIjlmMnprRStTuUVwWxXyYzZ%"
    formats = [f"<%{letter}>" for letter in letters] + ["%-d/%-m", "100%% %%d %%%H", "%Q", "a%", ""]
    asks = "|".join("{{ strftime_now(" + repr(format) + ") }}" for format in formats)
    text = kinds["chat"].apply_chat_template(
        ROW["messages"], chat_template=with_time(asks, now), tokenize=False
    )
    assert text.split("|") == [now.strftime(format) for format in formats]


IN_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# It refuses a content that is a text.
IN_STRICT_PARTS = IN_PARTS.replace(
    "{% for part",
    "{% if m.content is string %}{{ raise_exception('parts') }}{% endif %}{% for part",
)


@pytest.mark.parametrize("in_parts", [IN_PARTS, IN_STRICT_PARTS])
def test_a_template_that_reads_parts_alone_gets_them(kinds, in_parts):
    """As templates of vision models do: of a content that is a text they write nothing."""
    as_text = IN_PARTS.replace(
        "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}",
        "{{ m.content }}",
    )
    read, expected = (load(kinds["chat"], chat_template=text) for text in (in_parts, as_text))
    assert read.prompt.tolist() == expected.prompt.tolist()
    assert read.completions[0].tolist() == expected.completions[0].tolist()
    assert read.masks[0].tolist() == expected.masks[0].tolist()
    assert "hello" in kinds["chat"].decode(read.completions[0])


def test_prompts_of_generate_and_of_reward_models_reach_a_template_that_reads_parts(
    kinds, monkeypatch
):
    tokenizer = kinds["chat"]
    monkeypatch.setattr(tokenizer, "chat_template", IN_PARTS)
    prompt = tokenizer.decode(prompt_ids(ROW["messages"][:1], tokenizer))
    assert prompt == "<|im_start|>user\na<|im_end|><|im_start|>assistant\n"

    model = torch.nn.Identity()
    model.config = LlamaConfig(max_position_embeddings=100)
    scorer = TextScorer(model, tokenizer)
    ids = scorer.token_ids(ROW["messages"][:1], ROW["messages"][1:])
    assert "hello" in tokenizer.decode(ids)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    del scorer.template
    with pytest.raises(ModelError, match="the tokenizer of the reward or preference model has no"):
        scorer.token_ids(ROW["messages"][:1], ROW["messages"][1:])


def test_the_clock_of_a_reward_models_template_is_the_recipes(kinds, monkeypatch):
    tokenizer = kinds["chat"]
    monkeypatch.setattr(tokenizer, "chat_template", DATED)
    model = torch.nn.Identity()
    model.config = LlamaConfig(max_position_embeddings=100)
    scorer = TextScorer(model, tokenizer, template_time="2025-03-04T05:06")
    ids = scorer.token_ids(ROW["messages"][:1], ROW["messages"][1:])
    assert tokenizer.decode(ids).startswith("<|im_start|>04 Mar 202505:06<|im_end|>")


@pytest.mark.parametrize("text", ["{{ 1 / 0 }}", "{{ messages[9].content.a }}", "{{ ''.join(1) }}"])
def test_whatever_a_template_raises_is_a_refusal_of_the_row(kinds, text):
    with pytest.raises(DataError, match=r"template: 1 row .*: the chat template refuses the conv"):
        load(kinds["chat"], chat_template=text)


def test_a_template_that_is_no_jinja_is_named_as_such(kinds, monkeypatch):
    broken = "{% for m in messages %}"
    with pytest.raises(ConfigError, match=r"data.chat_template is not valid Jinja \(line 1: "):
        load(kinds["chat"], chat_template=broken)
    monkeypatch.setattr(kinds["chat"], "chat_template", broken)
    with pytest.raises(ModelError, match="the tokenizer's chat template is not valid Jinja"):
        load(kinds["chat"])


@pytest.mark.parametrize("family", ["pair", "sequence"])
@pytest.mark.parametrize(
    "beginning", ["{{ messages | length }}", "{{ range(99999) | random }}", ""]
)
def test_a_prompt_that_is_trained_as_an_answer_is_noticed(kinds, family, beginning):
    """The beginning depends on whether the answer is there already."""
    question = {"role": "user", "content": "hello there"}
    rows = [
        {
            "prompt": [question],
            "chosen": [{"role": "assistant", "content": "world"}],
            "rejected": [{"role": "assistant", "content": "cat"}],
        }
    ]
    config = DataConfig(chat_template=beginning + CHANGELESS)
    report = load_bundles(config, family, kinds["chat"], source=rows)[1]
    assert report.count("prompt_trained") == (1 if beginning else 0)


@pytest.mark.parametrize(
    ("order", "places_one_turn"),
    [("messages | reverse", False), ("messages[-1:] + messages[:-1]", True)],
)
def test_a_template_that_writes_the_answer_before_the_question_is_noticed(
    kinds, order, places_one_turn
):
    """With one turn or a pair, the question is trained, which is a warning. Of several turns those
    that cannot be placed are not trained; with none left the row is refused.
    """
    config = DataConfig(chat_template=CHANGELESS.replace("in messages", f"in ({order})"))
    question = {"role": "user", "content": "hello there"}
    answers = [[{"role": "assistant", "content": words}] for words in ("world", "cat")]
    pair = {"prompt": [question], "chosen": answers[0], "rejected": answers[1]}
    one_turn = {"prompt": [question], "completion": answers[0]}
    for family, row in [("pair", pair), ("sequence", one_turn)]:
        report = load_bundles(config, family, kinds["chat"], source=[row])[1]
        assert report.count("prompt_trained") == 1

    several = [{"messages": [question, *answers[0], question, *answers[1]]}]
    if places_one_turn:
        report = load_bundles(config, "sequence", kinds["chat"], source=several)[1]
        assert report.count("untrained_turn") == 1
    else:
        with pytest.raises(DataError, match="none can be found in the text"):
            load_bundles(config, "sequence", kinds["chat"], source=several)
