"""Who writes a setting as another tool calls it is told what it is called here."""

import re
from inspect import signature

import pytest

from alignkit.config.objective_fields import fields_of
from alignkit.config.other_names import ARGUMENTS, FIELDS, LOSSES, VALUES
from alignkit.config.recipe import Recipe, load_recipe
from alignkit.config.validation import field_names
from alignkit.errors import ConfigError
from alignkit.objectives import OBJECTIVES
from alignkit.runs.from_python import _sections, train

OURS = {*field_names(Recipe)} | {
    f"objective.{field}" for name in OBJECTIVES for field in fields_of(name).model_fields
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_hint_names_a_field_of_a_recipe(name):
    named = re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)[`=]", FIELDS[name])
    beside = {"objective.name", "model.adapter.peft.use_dora", "model.adapter.peft.use_rslora"}
    beside |= {"model.adapter.peft.modules_to_save", "max_rows", "weight"}
    assert set(named) <= OURS | beside
    assert named or "not needed" in FIELDS[name] or "--resume" in FIELDS[name]
    assert f"train.{name}" not in OURS


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.num_train_epochs=1", "In alignkit it is `train.epochs`"),
        ("train.per_device_train_batch_size=4", "In alignkit it is `train.batch_size`, rows per"),
        ("data.eval_split=0.25", "data.split=train[:75%] data.eval_split=train[75%:]"),
        ("data.test_size=0.1", "data.split=train[:90%] data.eval_split=train[90%:]"),
        ("train_test_split=0.1", "data.split=train[:90%] data.eval_split=train[90%:]"),
        ("data.dataset_test_split=test", "In alignkit it is `data.eval_split`."),
        ("num_generations=4", "In alignkit it is `rollout.completions`."),
        ("model.load_in_4bit=true", "In alignkit it is `model.quantize=4bit`."),
        ("model.adapter.lora_alpha=16", "In alignkit it is `model.adapter.alpha`."),
        ("objective.loss_type=ipo", "In alignkit it is `objective.name`"),
        ("train.optimizer=adamw_torch", "In alignkit it is `adamw`."),
        ("train.schedule=constant_with_warmup", "In alignkit it is `constant`, with train.warmup"),
        ("rewards=[{function:mine.py:score}]", "YAML needs a space after a colon"),
        ("trackers=wandb", "it should be a list. Write [wandb]."),
        ("rollout.stop=.", 'it should be a list. Write ["."].'),
        ("objective.name=sigmoid", "there is no objective `sigmoid`. In alignkit it is `dpo`."),
        ("train.stepz=1", "Did you mean `steps`?"),
    ],
)
def test_a_message_says_what_it_is_called_here(override, words):
    with pytest.raises(ConfigError) as caught:
        load_recipe("dpo", [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [*ARGUMENTS, "report_to"])
def test_arguments_of_other_trainers_are_named_in_python(name):
    with pytest.raises(ConfigError, match=f"no argument `{name}`. In alignkit it is ") as caught:
        _sections({name: 1})
    named = re.search(r"it is `(\w+)", str(caught.value))
    assert name == "args" or named[1] in {*signature(train).parameters, "reference", "trackers"}


def test_our_own_values_are_not_among_theirs():
    assert not LOSSES.keys() & OBJECTIVES.keys()
    assert {re.search(r"`(\w+)`", words)[1] for words in LOSSES.values()} <= OBJECTIVES.keys()
    assert not {"adamw", "adamw_8bit", "cosine", "constant", "wsd", "bfloat16"} & VALUES.keys()
