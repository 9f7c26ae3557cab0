"""Recipes whose sources have objectives of their own: what a run writes, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file
from world import SHORT_RUN, pair_rows, run, write_inputs, write_rows

import alignkit
from alignkit.config import load_recipe
from alignkit.errors import CheckpointError, ConfigError, DataError
from alignkit.files import read_jsonl
from alignkit.runs.launch import run_recipe

SETTINGS = {**SHORT_RUN, "steps": 6, "eval_every": 3, "save_every": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_inputs(folder)
    rows = pair_rows(12)
    told = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    write_rows(folder / "told.jsonl", told[:8])
    write_rows(folder / "held_out.jsonl", told[8:])
    return folder


def recipe(world, out, *overrides, streams=None):
    online = f"{{source: {world}/prompts.jsonl, objective: {{name: rpg, beta: 0.1}}, share: 3, eval: {world}/pairs.jsonl}}"
    told = f"{{source: {world}/told.jsonl, objective: {{name: sft}}, share: 1, eval: {world}/held_out.jsonl}}"
    settings = [f"train.{name}={value}" for name, value in SETTINGS.items()]
    file = out.parent / f"{out.name}.yaml"
    file.write_text("rollout: {completions: 2, max_new_tokens: 4}\n")
    return load_recipe(
        file,
        [
            f"data.train={streams or f'[{online}, {told}]'}", f"model.name_or_path={world / 'model'}",
            f"rewards=[{{function: {world}/worth.py:worth}}]", f"output_dir={out}", *settings,
            *overrides,
        ],
    )  # fmt: skip


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def test_a_run_and_its_resumption(world, tmp_path):
    run_recipe(recipe(world, tmp_path / "whole", "data.reweigh={window: 2}"))
    rows = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
    for row in rows:
        assert row["loss"] == pytest.approx(
            row["rpg/weight"] * row["rpg/loss"] + row["sft/weight"] * row["sft/loss"]
        )
    assert (rows[0]["rpg/weight"], rows[0]["sft/weight"]) == (0.75, 0.25)
    assert rows[5]["rpg/weight"] != 0.75
    assert {"eval_sft_loss", "eval_rpg_reward"} <= rows[2].keys()
    assert 0 <= rows[2]["rpg/reward"] <= 1
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "| RPG | 0.75 |" in card
    assert "sft: " in card
    assert "`objective` is set" not in card
    shown = load_recipe(tmp_path / "whole" / "recipe.yaml")
    assert shown.train.metric == "eval_rpg_reward"
    assert shown.data.train[0].objective == {"name": "rpg", "beta": 0.1}

    part = tmp_path / "part"
    run_recipe(recipe(world, part, "data.reweigh={window: 2}"))
    (part / "model").rename(tmp_path / "gone")
    resumed = run_recipe(recipe(world, part, "data.reweigh={window: 2}"), resume="auto")
    assert resumed.resumed_from == 3
    whole, again = weights(tmp_path / "whole"), weights(part)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())

    (part / "model").rename(tmp_path / "gone too")
    other = recipe(world, part, "data.reweigh={window: 2}", "data.train.1.share=2")
    with pytest.raises(CheckpointError, match="streams"):
        run_recipe(other, resume="auto")


def stream(world, text):
    return f"{{source: {world}/told.jsonl, {text}}}"


REFUSED = {
    # what the list says -> words of the error
    "objective: {name: sft}, share: 1 | share: 1": "told.jsonl has no objective and others have one",
    "objective: {name: sft} | objective: {name: ipo}": "streams need shares",
    "objective: {name: sft}, share: 1 | objective: {name: sft}, share: 1": "two streams are called 'sft'",
    "objective: {name: sft}, share: 1 | objective: {name: stf}, share: 1": "Did you mean `sft`",
    "objective: {name: sft}, share: 1 | objective: {name: dpo, betaa: 1}, share: 1": "Did you mean `beta`",
    "objective: {name: sft}, share: 9 | objective: {name: dpo}, share: 1": "`dpo` is no row of a step of 4",
    "objective: {name: sft}, share: 1 | objective: {}, share: 1": "told.jsonl has no name; give it one",
    "share: 1, name: a | share: 1": "only streams have",
    "objective: {name: sft}, share: 1, name: a b | objective: {name: dpo}, share: 1": "'a b' is no name",
}  # fmt: skip


@pytest.mark.parametrize("given", REFUSED)
def test_bad_streams_are_one_sentence(world, tmp_path, given):
    listed = ", ".join(stream(world, text) for text in given.split(" | "))
    with pytest.raises(ConfigError) as error:
        recipe(world, tmp_path / "run", streams=f"[{listed}]")
    assert REFUSED[given] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.eval=task:reviews", "give each of them its own"),
        ("train={epochs: 1, steps: null}", "`train.epochs` has no meaning for streams"),
        ("rollout.ahead=1", "does not work with streams"),
        ("rollout.temperature=0.5", "rows of a file come from no temperature"),
        ("rewards=[]", "this objective needs `rewards`"),
    ],
)
def test_what_streams_cannot_have_is_refused_before_a_model_is_loaded(
    world, tmp_path, override, words, monkeypatch
):
    monkeypatch.setattr("alignkit.runs.launch.load_context", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=words):
        run_recipe(recipe(world, tmp_path / "run", override))
    assert not (tmp_path / "run").exists()


def test_commands_of_one_objective_refuse_streams(world, tmp_path, capsys):
    given = recipe(world, tmp_path / "run")
    file = tmp_path / "mine.yaml"
    from alignkit.config.recipe import dump_recipe

    file.write_text(dump_recipe(given))
    assert run("iterate", file, f"output_dir={tmp_path / 'rounds'}") == 2
    assert "`alignkit iterate` trains runs of one objective" in capsys.readouterr().err
    grid = "compare={grid: {dpo: {name: dpo}}, seeds: [0]}"
    assert run("compare", file, grid, f"output_dir={tmp_path / 'grid'}") == 2
    assert "`alignkit compare` trains runs of one objective" in capsys.readouterr().err
    assert run("recipes", "show", file) == 0
    assert "name: rpg" in capsys.readouterr().out

    rows = [{"source": f"{world}/told.jsonl", "objective": {"name": "sft"}, "share": 1}]
    with pytest.raises(ConfigError, match="`train` is given one for all"):
        alignkit.train(
            alignkit.SFT(), model=str(world / "model"), data=rows, output_dir=tmp_path / "python"
        )


def test_bad_rows_name_their_stream(world, tmp_path):
    online = f"{{source: {world}/prompts.jsonl, objective: {{name: rpg}}, share: 1}}"
    wrong = f"{{source: {world}/prompts.jsonl, objective: {{name: sft}}, share: 1}}"
    with pytest.raises(DataError, match="stream `sft`: "):
        run_recipe(recipe(world, tmp_path / "run", streams=f"[{online}, {wrong}]"))
