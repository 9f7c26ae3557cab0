"""`alignkit.train` with live objects takes the path of a recipe: the same weights, bit for bit."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import pair_rows, save_model, write_rows

import alignkit
from alignkit.config.recipe import load_recipe
from alignkit.errors import CheckpointError, ConfigError, ModelError
from alignkit.runs.launch import run_recipe

SETTINGS = {"steps": 3, "batch_size": 4, "eval_every": 0, "save_every": 2, "log_samples_every": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def live(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def recipe_run(folder, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(12))
    file = tmp_path / "mine.yaml"
    file.write_text("objective: {name: dpo, beta: 0.1}")
    out = tmp_path / "by-recipe"
    overrides = [f"train.{name}={value}" for name, value in SETTINGS.items()]
    places = [f"model.name_or_path={folder}", f"data.train={rows}", f"output_dir={out}"]
    run_recipe(load_recipe(file, [*places, *overrides]))
    return out


def test_a_live_model_and_a_dataset_give_the_weights_of_the_recipe(folder, live, tmp_path):
    out = recipe_run(folder, tmp_path)
    expected = weights(AutoModelForCausalLM.from_pretrained(out / "model"))
    model, tokenizer = live
    data = Dataset.from_list(pair_rows(12))
    objective = alignkit.DPO(beta=0.1)
    run = alignkit.train(
        objective,
        model=model,
        tokenizer=tokenizer,
        data=data,
        output_dir=tmp_path / "a",
        **SETTINGS,
    )
    assert run.model is model
    for name, value in weights(run.model).items():
        assert torch.equal(value, expected[name]), name
    assert run.metrics["step"].tolist() == [1, 2, 3]
    recorded = load_recipe(run.folder / "recipe.yaml")
    assert recorded.model.name_or_path.startswith("python:LlamaForCausalLM-")
    assert recorded.data.train.startswith("python:rows-")
    assert recorded.objective["name"] == "dpo"

    # A second call in the same process, from the same start, with a path instead of an object.
    again = alignkit.train(
        objective, model=folder, data=pair_rows(12), output_dir=tmp_path / "b", train=SETTINGS
    )
    for name, value in weights(again.model).items():
        assert torch.equal(value, expected[name]), name


def test_a_live_adapter_keeps_its_start_as_the_reference(folder, live, tmp_path):
    base, tokenizer = live
    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, settings, adapter_name="mine")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".mine." in n}
    run = alignkit.train(
        alignkit.DPO(), model=model, tokenizer=tokenizer, data=pair_rows(12),
        output_dir=tmp_path / "run", learning_rate=1e-2, warmup_steps=0, **SETTINGS,
    )  # fmt: skip
    assert run.metrics["loss"][0] == pytest.approx(0.693147, abs=1e-6)  # policy = reference
    moved = dict(model.named_parameters())
    assert any(not torch.equal(moved[name], value) for name, value in before.items())
    twin = {name: name.replace(".mine.", ".reference.") for name in before}
    for name, value in before.items():
        assert torch.equal(moved[twin[name]], value), "the twin stays where training began"
    assert (run.folder / "model" / "mine" / "adapter_config.json").is_file() or (
        run.folder / "model" / "adapter_config.json"
    ).is_file()


def test_rewards_are_functions(folder, live, tmp_path):
    model, tokenizer = live

    def length(completions, **columns):
        return [float(len(text)) for text in completions]

    run = alignkit.train(
        alignkit.RLOO(), model=model, tokenizer=tokenizer, data=[{"prompt": "w3 w4"}] * 4,
        rewards=[length], output_dir=tmp_path / "run", completions=2, max_new_tokens=3, **SETTINGS,
    )  # fmt: skip
    assert run.metrics["reward"].notna().all()
    assert "rewards/length/mean" in run.metrics


def test_other_rows_are_another_run(folder, tmp_path):
    options = {"model": folder, "output_dir": tmp_path / "run", **SETTINGS, "steps": 4}
    alignkit.train(alignkit.DPO(), data=pair_rows(12), **options)
    (tmp_path / "run" / "model").rename(tmp_path / "gone")  # as if stopped before the end
    with pytest.raises(CheckpointError, match="another run"):
        alignkit.train(alignkit.DPO(), data=pair_rows(12)[::-1], resume="auto", **options)
    alignkit.train(alignkit.DPO(), data=pair_rows(12), resume="auto", **options)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"stepps": 3}, ConfigError, "Did you mean `steps`"),
        ({"dtype": "float32"}, ConfigError, "field of train and model"),
        ({"data": 3}, ConfigError, "data is a int"),
        ({"learning_rate": -1.0}, ConfigError, "learning_rate"),
        ({"model": object()}, ConfigError, "needs its tokenizer"),
        ({"model": object(), "tokenizer": 1}, ModelError, "causal language model"),
        ({"rewards": ["words"]}, ConfigError, "rewards: entry 0"),
        ({"objective": "dpo"}, ConfigError, "give an objective"),
    ],
)
def test_bad_arguments_get_a_sentence(folder, tmp_path, arguments, error, match):
    given = {
        "objective": alignkit.DPO(),
        "model": folder,
        "data": pair_rows(4),
        "output_dir": tmp_path / "run",
        **arguments,
    }
    with pytest.raises(error, match=match):
        alignkit.train(given.pop("objective"), **given)
    assert not (tmp_path / "run").exists()


def test_evaluate_and_compare_are_the_commands(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean `samples`"):
        alignkit.evaluate("runs/x", sample=3)
    with pytest.raises(ConfigError, match="there is no recipe"):
        alignkit.compare("no_such_recipe")


def test_held_out_rows_and_a_judge(folder, tmp_path):
    run = alignkit.train(
        alignkit.DPO(), model=folder, data=pair_rows(8), eval_data=Dataset.from_list(pair_rows(12)[8:]),
        output_dir=tmp_path / "pairs", **{**SETTINGS, "eval_every": 3},
    )  # fmt: skip
    assert run.metrics["eval_loss"].notna().sum() == 1

    def longer(prompts, first, second):
        return [float(len(a) > len(b)) for a, b in zip(first, second)]

    run = alignkit.train(
        alignkit.NashMD(), model=folder, data=[{"prompt": "w3 w4"}] * 4, judge=longer,
        output_dir=tmp_path / "game", max_new_tokens=3, **SETTINGS,
    )  # fmt: skip
    assert run.metrics["loss"].notna().all()
