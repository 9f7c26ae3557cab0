"""Inputs of users on which data were once read wrongly."""

import pytest
from transformers import AutoTokenizer
from world import run, write_rows

from alignkit.config.data import DataConfig
from alignkit.data.load import load_bundles, load_prompts
from alignkit.data.read import held_out

SHORT = (
    "train.steps=1",
    "train.batch_size=1",
    "train.save_every=0",
    "train.log_samples_every=0",
    "data.eval=null",
)


@pytest.fixture(scope="module")
def tokenizer(cases):
    """A tokenizer with a chat template and tools."""
    return AutoTokenizer.from_pretrained(cases / "tools" / "tooltok")


def test_evaluation_on_the_same_set_reads_its_test_split(cases, tokenizer):
    path = str(cases / "eval_split_train" / "dd")
    config = DataConfig(train=path, eval=path)
    training, _ = load_bundles(config, "pair", tokenizer)
    evaluation, report = load_bundles(config, "pair", tokenizer, source=held_out(config))
    assert (len(training), len(evaluation)) == (8, 3)
    assert report.source.endswith("split test")


def only_row(tokenizer, path, family="pair"):
    """Prompt and completions of the first row as text, special tokens included; and the report."""
    (bundle, *_), report = load_bundles(DataConfig(), family, tokenizer, source=path)
    texts = [tokenizer.decode(ids) for ids in bundle.completions]
    return tokenizer.decode(bundle.prompt), texts, report


@pytest.mark.parametrize(
    ("name", "shared", "answers"),
    [
        ("uf_sys", [("system", "Be brief."), ("user", "What is 2+2?")], ["four it is", "five"]),
        ("uf_last", [("user", "Hi"), ("assistant", "Hello."), ("user", "2+2?")], ["four", "five"]),
    ],
)
def test_dialogues_beside_a_text_prompt_are_said_once(cases, tokenizer, name, shared, answers):
    prompt, completions, _ = only_row(tokenizer, cases / "dialogue_prompt" / f"{name}.jsonl")
    turns = [f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in shared]
    assert prompt == "".join(turns) + "<|im_start|>assistant\n"
    assert completions == [f"{answer}<|im_end|>\n" for answer in answers]


@pytest.mark.parametrize("name", ["tools", "tools_str"])
def test_tools_in_parquet_have_no_nulls(cases, tokenizer, name):
    path = cases / "tools" / f"{name}.parquet"
    prompt, (chosen, _), report = only_row(tokenizer, path)
    assert "null" not in prompt + chosen
    assert '"properties": {"city": {"type": "string"}}' in prompt
    assert '"arguments": {"city": "Rome"}' in chosen
    assert report.count("nulls_dropped") == report.total == report.usable


def test_a_tool_call_needs_no_content(cases, tokenizer):
    path = cases / "tool_calls_no_content" / "rows.jsonl"
    _, (chosen, rejected), _ = only_row(tokenizer, path)
    call = '{"name": "weather", "arguments": {"city": "Rome"}}'
    assert chosen == f"<tool_call>{call}</tool_call><|im_end|>\n"
    assert rejected == "I cannot<|im_end|>\n"


def test_a_turn_of_weight_zero_is_not_trained(cases, tokenizer):
    path = cases / "openai_weight" / "weight.jsonl"
    prompt, completions, _ = only_row(tokenizer, path, "sequence")
    assert "BAD TURN" in prompt
    assert completions == ["GOOD<|im_end|>\n"]


def test_reward_columns_that_clash_are_withheld(cases, tokenizer):
    path = cases / "reward_column_clash" / "clash_completions.jsonl"
    prompts, report = load_prompts(DataConfig(), tokenizer, source=path)
    assert [prompt.columns for prompt in prompts] == [{}] * 4
    assert report.count("reserved_column") == 4


def test_the_template_that_was_used_is_saved_with_the_model(cases, tmp_path):
    case = cases / "chat_template_lost"
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "hello"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    rows = write_rows(tmp_path / "pairs.jsonl", [row])
    settings = [*SHORT, f"data.train={rows}", f"model.name_or_path={case / 'model'}"]
    settings += [f"data.chat_template={case / 't.jinja'}", f"output_dir={tmp_path / 'run'}"]
    assert run("train", "dpo", *settings) == 0
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert saved.chat_template == (case / "t.jinja").read_text().removesuffix("\n")
    assert run("generate", tmp_path / "run", "hi", "--chat", "--max-new-tokens", "2") == 0


def test_rows_beyond_the_position_table_are_a_sentence(cases, tmp_path, capsys):
    answers = {"chosen": " the cat sat" * 20, "rejected": " no"}
    rows = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "hello", **answers}])
    model = cases / "context_overflow" / "model"
    settings = [*SHORT, f"data.train={rows}", f"model.name_or_path={model}"]
    settings += ["data.max_length=128", f"output_dir={tmp_path / 'run'}"]
    assert run("train", "dpo", *settings) == 3
    message = capsys.readouterr().err
    assert "longer than the 48 positions of the model" in " ".join(message.split())
    assert "Traceback" not in message
