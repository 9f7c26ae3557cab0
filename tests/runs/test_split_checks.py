"""A split that does not exist is reported before anything is loaded, with those that exist."""

import json

import datasets
import pytest

import alignkit
from alignkit.config.recipe import load_recipe
from alignkit.errors import ConfigError, DataError
from alignkit.runs.checks import check_without_torch

ROWS = [{"prompt": "a", "chosen": " b", "rejected": " c"}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    parts = {"train": ROWS, "heldout": ROWS}
    (tmp_path / "set.json").write_text(json.dumps(parts))
    tables = {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "saved"))
    other = datasets.DatasetDict({"one": datasets.Dataset.from_list(ROWS)})
    other.save_to_disk(str(tmp_path / "other"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(*overrides):
    check_without_torch(load_recipe("dpo", ["model.name_or_path=nowhere", *overrides]))


@pytest.mark.parametrize("source", ["saved", "set.json"])
@pytest.mark.parametrize(
    "overrides",
    [
        ["data.train=SOURCE", "data.split=heldou"],
        ["data.train=SOURCE", "data.eval=SOURCE", "data.eval_split=heldou"],
        ["data.train=[{source: SOURCE, split: heldou}]"],
        ["data.train=SOURCE", "data.eval={one: {source: SOURCE, split: heldou}}"],
    ],
)
def test_the_splits_that_exist_are_named(folder, source, overrides):
    with pytest.raises(DataError, match="no split `heldou`; the splits are train, heldout"):
        check(*(text.replace("SOURCE", source) for text in overrides))
    check(*(text.replace("SOURCE", source).replace("heldou", "heldout") for text in overrides))


def test_a_saved_set_without_the_usual_split(folder):
    with pytest.raises(DataError, match="no split `train`; the splits are one"):
        check("data.train=other")


@pytest.mark.parametrize(
    "changes",
    [
        ["data.split=heldou"],
        ["data.eval=task:reviews", "data.eval_split=heldou"],
        ["data.subset=en"],
    ],
)
def test_a_task_has_no_other_splits(changes):
    """They were left unread, so a run trained and measured on other rows than it was asked to."""
    with pytest.raises(ConfigError, match=r"task:reviews has its own rows .* leave out"):
        load_recipe("dpo", changes)
    assert load_recipe("dpo", ["data.eval=task:reviews", "data.eval_split=eval"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"split": "test"}, r"task:reviews has its own rows .* `data.split`"),
        ({"reference": {"kind": "frozn"}}, r"neither a kind nor a path. Did you mean `frozen`"),
        ({"steps": None}, r"`train.steps` and `train.epochs` are both null"),
    ],
)
def test_code_is_held_to_what_a_recipe_is(tmp_path, settings, words):
    settings = {"steps": 1, **settings}
    with pytest.raises(ConfigError, match=words):
        alignkit.train(
            alignkit.DPO(), model="task", data="task:reviews", output_dir=tmp_path, **settings
        )
