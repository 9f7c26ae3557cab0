"""Pushing a finished model, against a stand-in of the hub's HTTP API with the hub's real client."""

import pytest
import yaml
from huggingface_hub import ModelCard
from pydantic import ValidationError
from small_hub import small_hub
from world import pair_rows, run, save_model, write_rows

from alignkit.config import build_objective, load_recipe
from alignkit.config.hub import HubConfig
from alignkit.errors import ResourceError
from alignkit.runs.hub import push_model
from alignkit.runs.model_card import model_card


def train(folder, *overrides):
    if not (folder / "model").exists():
        save_model(folder / "model")
        write_rows(folder / "pairs.jsonl", pair_rows(8))
    return run(
        *("train", "ipo", f"model.name_or_path={folder / 'model'}"),
        *(f"data.train={folder / 'pairs.jsonl'}", f"output_dir={folder / 'run'}"),
        *("train.steps=1", "train.batch_size=4", "train.log_samples_every=0", *overrides),
    )


def test_a_run_is_pushed_and_a_failed_push_keeps_it(tmp_path, monkeypatch, capsys):
    with small_hub(monkeypatch) as hub:
        hub.fails = True
        assert train(tmp_path, "hub.push=tiny-ipo") == 7
        error = " ".join(capsys.readouterr().err.split())
        assert "hub.push: tiny-ipo was not pushed" in error
        assert "--resume auto" in error
        assert (tmp_path / "run" / "model" / "model.safetensors").exists()

        hub.fails = False
        assert train(tmp_path, "hub.push=tiny-ipo", "--resume", "auto") == 0
    pushed = hub.repositories["me/tiny-ipo"]
    assert pushed["private"] is True
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
        assert pushed["files"][name] == (tmp_path / "run" / "model" / name).read_bytes()
    card = pushed["files"]["README.md"].decode()
    assert "form = sum" in card  # which of the two IPOs it was
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["alignkit", "ipo"]


def test_a_public_repository_is_not_pushed_to_by_mistake(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with small_hub(monkeypatch) as hub:
        push_model(tmp_path / "model", HubConfig(push="us/open", private=False))
        assert hub.repositories["us/open"]["private"] is False
        with pytest.raises(ResourceError, match="exists and is public"):
            push_model(tmp_path / "model", HubConfig(push="us/open"))


def test_the_header_is_the_hubs():
    overrides = ["model.name_or_path=Qwen/Qwen3-0.6B", "data.train=trl-lib/ultrafeedback_binarized"]
    recipe = load_recipe("dpo", [*overrides, "model.adapter.r=8"])
    text = model_card(recipe, build_objective(recipe.objective), [])({"loss": 0.5})
    data = ModelCard(text).data
    assert data.base_model == "Qwen/Qwen3-0.6B"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert data.datasets == ["trl-lib/ultrafeedback_binarized"]
    assert data.library_name == "peft"
    assert data.pipeline_tag == "text-generation"


def test_a_path_of_this_machine_is_no_base_model(tmp_path):
    recipe = load_recipe("dpo", [f"model.name_or_path={tmp_path}"])
    text = model_card(recipe, build_objective(recipe.objective), [])({})
    assert ModelCard(text).data.base_model is None


@pytest.mark.parametrize("name", ["", "a/b/c", "../x", "a b", "a--b", "-a"])
def test_names_that_the_hub_does_not_take(name):
    with pytest.raises(ValidationError, match="no name on the hub"):
        HubConfig(push=name)
