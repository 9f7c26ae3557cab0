"""The chat template that a recipe gives is saved with the model, in every form of it."""

import json

import pytest
from transformers import AutoTokenizer
from world import run, save_model, write_rows

from alignkit.config.recipe import load_recipe
from alignkit.policies.folding import merge
from alignkit.runs.launch import run_recipe

TEMPLATE = (
    "{% for m in messages %}{{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %}w3 {% endif %}"
)
OLD = "{% for m in messages %}old {{ m.content }} </s>{% endfor %}"
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"w{4 + i}"}],
        "chosen": [{"role": "assistant", "content": "w5 w6"}],
        "rejected": [{"role": "assistant", "content": "w7"}],
    }
    for i in range(4)
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    write_rows(folder / "pairs.jsonl", ROWS)
    (folder / "mine.jinja").write_text(TEMPLATE)

    templated = AutoTokenizer.from_pretrained(save_model(folder / "old"))
    templated.chat_template = OLD
    templated.save_pretrained(folder / "old")
    return folder


def trained(world, out, recipe, *overrides):
    settings = [
        f"data.train={world / 'pairs.jsonl'}",
        f"data.chat_template={world / 'mine.jinja'}",
        f"output_dir={out}",
        "train.steps=1",
        "train.batch_size=4",
        "train.save_every=0",
        "train.log_samples_every=0",
        "data.eval=null",
    ]
    run_recipe(load_recipe(recipe, [*settings, *overrides]))


@pytest.mark.parametrize("model", ["model", "old"])
@pytest.mark.parametrize("adapter", ["null", "{r: 2}"])
def test_the_template_that_was_used_is_saved(world, tmp_path, capsys, model, adapter):
    out = tmp_path / "run"
    name = f"model.name_or_path={world / model}"
    trained(world, out, "dpo", name, f"model.adapter={adapter}")
    assert AutoTokenizer.from_pretrained(out / "model").chat_template == TEMPLATE
    assert run("generate", out, "w4", "--chat", "--max-new-tokens", "1") == 0

    if adapter != "null":
        merge(out, tmp_path / "merged")
        assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == TEMPLATE


def test_a_reward_model_scores_with_the_template_it_was_trained_with(world, tmp_path):
    out = tmp_path / "run"
    trained(world, out, "reward_model", f"model.name_or_path={world / 'old'}")
    assert AutoTokenizer.from_pretrained(out / "model").chat_template == TEMPLATE


def test_without_a_template_of_the_recipe_the_model_keeps_its_own(world, tmp_path):
    out = tmp_path / "run"
    name = f"model.name_or_path={world / 'old'}"
    trained(world, out, "dpo", name, "data.chat_template=null")
    assert AutoTokenizer.from_pretrained(out / "model").chat_template == OLD
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
