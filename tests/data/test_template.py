"""The limits of chat templates, and the date that they print."""

import threading

import pytest

from alignkit.data import DataConfig, load_bundles, template
from alignkit.data.template import given_template
from alignkit.errors import ConfigError, ModelError

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "hello"}]}
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DATED = (
    "<|im_start|>{{ strftime_now('%d %b %Y') }}{{ strftime_now(\"%H:%M\") }}<|im_end|>"
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


def test_templates_in_other_threads_have_no_time_limit_but_work(kinds):
    made = []
    thread = threading.Thread(target=lambda: made.append(load(kinds["chat"], chat_template=DATED)))
    thread.start()
    thread.join()
    assert made


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
