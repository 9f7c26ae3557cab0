"""A template that prints the date: the run keeps the day on which it began."""

import datetime as clock

import pytest
from transformers import AutoTokenizer
from world import save_model, write_rows

from alignkit.config.recipe import load_recipe
from alignkit.errors import ConfigError
from alignkit.runs import resume
from alignkit.runs.launch import run_recipe

DATED = (
    "w{{ strftime_now('%d')|int }} {% for m in messages %}{{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %}w3 {% endif %}"
)
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"w{4 + i}"}],
        "chosen": [{"role": "assistant", "content": "w5 w6"}],
        "rejected": [{"role": "assistant", "content": "w7"}],
    }
    for i in range(4)
]


def on(monkeypatch, day):
    """Let the clock show a day of January 2026, where a run begins and where templates ask."""

    class Clock(clock.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, day, 9, 30)

    monkeypatch.setattr(resume, "datetime", Clock)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_run_that_is_resumed_on_another_day_is_the_same_run(tmp_path, monkeypatch, name):
    folder = save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rewards.py").write_text(
        "def score(prompts, completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    settings = [
        f"model.name_or_path={folder}",
        f"data.train={tmp_path / 'rows.jsonl'}",
        f"output_dir={tmp_path / 'run'}",
        "train.batch_size=4",
        "train.save_every=1",
        "train.log_samples_every=0",
        "train.steps=2",
        "data.eval=null",
    ]
    if name == "grpo":
        settings += [
            f"rewards=[{{function: '{tmp_path / 'rewards.py'}:score'}}]",
            "rollout.max_new_tokens=2",
            "rollout.completions=2",
        ]
    on(monkeypatch, 6)
    run_recipe(load_recipe(name, settings))
    written = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert written.data.template_time == "2026-01-06T09:30"

    # Undo the run's last step, so that there is something to go on with.
    (tmp_path / "run" / "model").rename(tmp_path / "finished")
    on(monkeypatch, 7)
    run_recipe(load_recipe(name, settings), "auto")
    written = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert written.data.template_time == "2026-01-06T09:30"


def test_times_are_iso_8601():
    for given, kept in [("2026-01-06", "2026-01-06"), ("2026-01-06T09:30", "2026-01-06T09:30")]:
        assert load_recipe("dpo", [f"data.template_time={given}"]).data.template_time == kept
    with pytest.raises(ConfigError, match="template_time"):
        load_recipe("dpo", ["data.template_time=yesterday"])
