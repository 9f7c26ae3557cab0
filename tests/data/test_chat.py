"""Conversations: the template's own BOS and end marks, thinking prompts, and masks over several
assistant turns.
"""

import pytest

from alignkit.data import DataConfig, load_bundles, load_prompts
from alignkit.errors import ConfigError, DataError, ModelError

PLAIN = (
    "{{ '<s>' }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def load(tokenizer, row, family="pair", **options):
    made, report = load_bundles(DataConfig(**options), family, tokenizer, source=[row])
    return made[0], report


def trained(tokenizer, bundle):
    """The stretches of trained text of the first completion."""
    runs, last = [], False
    for token, on in zip(bundle.completions[0].tolist(), bundle.masks[0].tolist()):
        if on:
            runs = [*runs[:-1], [*runs[-1], token]] if last else [*runs, [token]]
        last = on
    return [tokenizer.decode(run) for run in runs]


def test_pairs_of_messages(kinds):
    tokenizer = kinds["chat"]
    row = {
        "prompt": [user("hello")],
        "chosen": [assistant("world")],
        "rejected": [assistant("there")],
    }
    bundle, report = load(tokenizer, row)
    # the generation prompt opens a thought, which both answers go on with
    assert (
        tokenizer.decode(bundle.prompt)
        == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert [tokenizer.decode(ids) for ids in bundle.completions] == [
        f"\n</think>\n\n{word}<|im_end|>\n" for word in ("world", "there")
    ]
    assert not report.count("no_end")


def test_answers_that_do_not_continue_the_generation_prompt(kinds):
    row = {
        "prompt": [user("hello")],
        "chosen": [assistant("<th</think>world")],
        "rejected": [assistant("the</think>cat")],
    }
    bundle, report = load(kinds["chat"], row)
    assert kinds["chat"].decode(bundle.prompt).endswith("<|im_start|>assistant\n")
    assert [kinds["chat"].decode(ids) for ids in bundle.completions] == [
        "<th</think>world<|im_end|>\n",
        "the</think>cat<|im_end|>\n",
    ]
    assert report.count("boundary") == 1


def test_the_same_pair_in_every_spelling(kinds):
    tokenizer = kinds["chat"]
    u, a, b = user("hello"), assistant("world"), assistant("there")
    rows = [
        {"prompt": [u], "chosen": [a], "rejected": [b]},
        {"prompt": [u], "chosen": "world", "rejected": "there"},
        {"prompt": "hello", "chosen": [a], "rejected": [b]},
        {
            "prompt": "hello",
            "chosen": [u, a],
            "rejected": [u, b],
        },  # the prompt stands in the completions once more
        {
            "prompt": "hello",
            "chosen": [u | {"tool_calls": None}, a],
            "rejected": [u, b],
        },  # Arrow's null for an absent key
        {"chosen": [u, a], "rejected": [u, b]},
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
            "chosen": [a | {"name": None}],
            "rejected": [b],
        },
    ]
    made = [load(tokenizer, row)[0] for row in rows]
    whole = {(tuple(b.prompt.tolist()), *(tuple(c.tolist()) for c in b.completions)) for b in made}
    assert len(whole) == 1


def test_no_second_bos_and_no_second_end(kinds):
    tokenizer = kinds["metaspace"]
    row = {"messages": [user("hello"), assistant("world")]}
    bundle, report = load(tokenizer, row, "sequence", chat_template=PLAIN)
    text = tokenizer.decode([*bundle.prompt.tolist(), *bundle.completions[0].tolist()])
    assert text.count("<s>") == 1
    assert bundle.completions[0].tolist().count(tokenizer.eos_token_id) == 1
    again, _ = load(tokenizer, row, "sequence", chat_template=PLAIN, append_eos=True)
    assert again.completions[0].tolist() == bundle.completions[0].tolist()
    unended = PLAIN.replace("</s>", " ")
    assert load(tokenizer, row, "sequence", chat_template=unended)[1].count("no_end") == 1
    ended, _ = load(tokenizer, row, "sequence", chat_template=unended, append_eos=True)
    assert ended.completions[0][-1] == tokenizer.eos_token_id
    assert ended.masks[0][-1]
    assert not report.count("no_end")


def test_every_assistant_turn_is_trained_and_nothing_else(kinds):
    tokenizer = kinds["metaspace"]
    turns = [
        user("hello"),
        assistant("world"),
        user("what is"),
        assistant("the cat"),
        user("ignored"),
    ]
    bundle, report = load(tokenizer, {"messages": turns}, "sequence", chat_template=PLAIN)
    assert trained(tokenizer, bundle) == ["world</s>", "the cat</s>"]
    assert not report.count("untrained_turn")


def test_turns_are_found_behind_a_doubled_bos(kinds):
    tokenizer = kinds["metaspace"]
    turns = [user("hello"), assistant("world"), user("what is"), assistant("the cat")]
    bundle, report = load(tokenizer, {"messages": turns}, "sequence", chat_template="<s>" + PLAIN)
    assert trained(tokenizer, bundle) == ["world</s>", "the cat</s>"]
    assert bundle.prompt.tolist().count(tokenizer.bos_token_id) == 1
    assert report.count("bos_once") == 1


def test_thoughts_that_the_template_drops_from_earlier_turns_are_taught(kinds):
    """Every turn gets the text that it has when it is the last, with its thoughts."""
    tokenizer = kinds["chat"]
    turns = [
        user("hello"),
        assistant("<think>hm</think>world"),
        user("what is"),
        assistant("the cat"),
    ]
    bundle, report = load(tokenizer, {"messages": turns}, "sequence")
    assert trained(tokenizer, bundle) == [
        "hm</think>world<|im_end|>\n",
        "\n</think>\n\nthe cat<|im_end|>\n",
    ]
    text = tokenizer.decode([*bundle.prompt, *bundle.completions[0]])
    assert text.count("<|im_start|>assistant\n<think>") == 2
    assert not report.count("untrained_turn")
    assert not report.count("thoughts_dropped")


def test_a_conversation_that_the_assistant_opens_has_one_bos(kinds):
    tokenizer = kinds["metaspace"]
    bundle, report = load(
        tokenizer, {"messages": [assistant("hello")]}, "sequence", chat_template=PLAIN
    )
    assert tokenizer.decode(bundle.prompt).replace(" ", "") == "<s>[assistant]"
    assert bundle.prompt.tolist().count(tokenizer.bos_token_id) == 1
    assert trained(tokenizer, bundle) == ["hello</s>"]
    assert not report.count("empty_prompt")


def test_a_turn_of_tool_calls_alone_is_trained(kinds):
    tokenizer = kinds["metaspace"]
    template = PLAIN.replace(
        "{{ m.content }}",
        "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].name }}{% endif %}",
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "the cat"}]}
    turns = [user("hello"), call, {"role": "tool", "content": "sat"}, assistant("world")]
    bundle, report = load(tokenizer, {"messages": turns}, "sequence", chat_template=template)
    assert trained(tokenizer, bundle) == ["the cat</s>", "world</s>"]
    assert not report.count("untrained_turn")


BACKWARDS = "{{ m.content if loop.last or m.role == 'user' else m.content|reverse }}"


def test_a_turn_that_cannot_be_found_is_left_out_and_counted(kinds):
    """What a template writes backwards is no longer what the assistant wrote."""
    tokenizer = kinds["metaspace"]
    template = PLAIN.replace("{{ m.content }}", BACKWARDS)
    turns = [user("a"), assistant("hello"), user("b"), assistant("the cat")]
    bundle, report = load(tokenizer, {"messages": turns}, "sequence", chat_template=template)
    assert trained(tokenizer, bundle) == ["the cat</s>"]
    assert report.count("untrained_turn") == 1


def test_a_template_that_rewrites_every_turn_is_refused(kinds):
    template = PLAIN.replace("{{ m.content }}", "{{ m.content|reverse }}")
    turns = [user("a"), assistant("hello"), user("b"), assistant("the cat")]
    with pytest.raises(
        DataError, match="the template changes every assistant turn; none can be found"
    ):
        load(kinds["metaspace"], {"messages": turns}, "sequence", chat_template=template)


def test_a_turn_that_a_template_rewrites_in_place_is_taught_as_it_was_written(kinds):
    """A turn is found by where it stands, so its content may change with what follows; pairs keep
    what the template makes of it.
    """
    tokenizer = kinds["metaspace"]
    template = PLAIN.replace("{{ m.content }}", "{{ m.content if loop.last else m.content|upper }}")
    turns = [user("a"), assistant("hello"), user("b"), assistant("the cat")]
    taught, report = load(tokenizer, {"messages": turns}, "sequence", chat_template=template)
    assert trained(tokenizer, taught) == ["hello</s>", "the cat</s>"]
    assert not report.count("untrained_turn")
    pair = {"prompt": turns[:1], "chosen": turns[1:], "rejected": [assistant("sat")]}
    assert trained(tokenizer, load(tokenizer, pair, chat_template=template)[0])[0] == "HELLO</s>"


def test_dialogues_that_diverge_train_their_assistant_turns(kinds):
    tokenizer = kinds["metaspace"]
    start = [user("hello"), assistant("there")]
    row = {
        "chosen": [*start, user("the cat"), assistant("sat")],
        "rejected": [*start, user("the mat"), assistant("looked"), user("on"), assistant("the")],
    }
    bundle, _ = load(tokenizer, row, chat_template=PLAIN)
    assert trained(tokenizer, bundle) == ["sat</s>"]
    assert [int(m.sum()) > 0 and not m.all() for m in bundle.masks] == [True, True]


def test_prompts_end_where_the_assistant_writes(kinds):
    config = DataConfig(chat_template=PLAIN)
    prompts, _ = load_prompts(
        config, kinds["metaspace"], source=[{"prompt": [user("hello")]}, {"prompt": "plain"}]
    )
    assert (
        kinds["metaspace"].decode(prompts[0].ids).replace(" ", "")
        == "<s>[user]hello</s>[assistant]"
    )
    assert prompts[0].text == [user("hello")]
    assert kinds["metaspace"].decode(prompts[1].ids).replace(" ", "") == "<s>plain"


def test_template_options_and_files(kinds, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ tools[0].function.name }}{{ mood }}" + PLAIN)
    row = {
        "messages": [user("a"), assistant("b")],
        "tools": [{"type": "function", "function": {"name": "calc"}}],
        "chat_template_kwargs": {"mood": "sunny"},
    }
    bundle, _ = load(kinds["metaspace"], row, "sequence", chat_template=str(tmp_path / "own.jinja"))
    assert (
        kinds["metaspace"].decode(bundle.prompt).replace(" ", "").startswith("calcsunny<s>[user]")
    )
    with pytest.raises(ConfigError, match="neither a Jinja template nor a file"):
        load(kinds["metaspace"], row, "sequence", chat_template="missing.jinja")


def test_no_template_and_templates_that_refuse(kinds):
    row = {"messages": [user("a"), assistant("b")]}
    with pytest.raises(ModelError, match="no chat template; give one with") as caught:
        load(kinds["metaspace"], row, "sequence")
    assert caught.value.exit_code == 4
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"template: 1 row .*rows:1: roles must alternate"):
        load(kinds["metaspace"], row, "sequence", chat_template=strict)
    with pytest.raises(ConfigError, match="split_special_tokens=true is for plain text"):
        load(kinds["chat"], row, "sequence", split_special_tokens=True)


def test_special_tokens_in_messages_are_counted_but_not_the_templates(kinds):
    clean = {"messages": [user("a"), assistant("b")]}
    forged = {"messages": [user("a<|im_end|>"), assistant("b")]}
    assert load(kinds["chat"], clean, "sequence")[1].count("special_tokens") == 0
    assert load(kinds["chat"], forged, "sequence")[1].count("special_tokens") == 1
