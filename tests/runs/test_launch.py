"""From recipe to run: online and self-play recipes with rewards and judges of a user's own,
evaluation, epochs, the card.
"""

import json
from datetime import timedelta

import pytest
import yaml
from world import pair_rows, save_model, write_rows

import alignkit
from alignkit.config import build_objective, load_recipe, shipped_recipes
from alignkit.errors import ConfigError
from alignkit.files import read_jsonl
from alignkit.runs.launch import make_accelerator, run_recipe
from alignkit.runs.model_card import model_card

HELPERS = """
def score(prompts, completions, **columns):
    return [float(len(c.split()) + n) for c, n in zip(completions, columns["n"])]

def longer(prompts, first, second):
    return [float(len(a) > len(b)) if len(a) != len(b) else 0.5 for a, b in zip(first, second)]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    (folder / "helpers.py").write_text(HELPERS)
    write_rows(folder / "pairs.jsonl", pair_rows(10))
    write_rows(folder / "held_out.jsonl", pair_rows(13)[10:])
    write_rows(
        folder / "prompts.jsonl",
        [{"prompt": row["prompt"], "n": i} for i, row in enumerate(pair_rows(10))],
    )
    return folder


def recipe(world, out, rows, *overrides):
    settings = [
        "train.steps=3",
        "train.batch_size=4",
        "train.save_every=0",
        "train.log_samples_every=0",
        "train.warmup_steps=0",
    ]
    paths = [
        f"model.name_or_path={world / 'model'}",
        f"data.train={world / rows}",
        f"output_dir={out}",
    ]
    return load_recipe(
        "dpo", [*paths, "rollout.max_new_tokens=5", "rollout.completions=3", *settings, *overrides]
    )


@pytest.mark.parametrize("objective", ["rloo", "kl_ppo"])
def test_an_online_recipe_with_a_reward_of_ones_own(world, tmp_path, caplog, objective):
    own = f"rewards.0.function={world / 'helpers.py'}:score"
    result = run_recipe(
        recipe(world, tmp_path / "run", "prompts.jsonl", f"objective={{name: {objective}}}", own)
    )
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert result.step == len(rows) == 3
    assert all(0 <= row["reward"] <= 5 + 9 for row in rows)
    assert f"rewards.0.function runs code from {world / 'helpers.py'}:score" in caplog.text


def test_a_self_play_recipe_with_a_judge_of_ones_own(world, tmp_path):
    own = f"judge.function={world / 'helpers.py'}:longer"
    result = run_recipe(
        recipe(
            world, tmp_path / "run", "prompts.jsonl", "objective={name: nash_md, beta: 0.1}", own
        )
    )
    assert result.step == 3
    assert result.metrics["judge/invalid"] == 0


def test_what_an_objective_needs_is_asked_for_before_models_load(world, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("no model can be loaded from this")
    for name, words in (("rloo", "needs `rewards`"), ("nash_md", "needs `judge`")):
        wanted = f"objective={{name: {name}}}"
        with pytest.raises(ConfigError, match=words) as caught:
            run_recipe(
                recipe(
                    world,
                    tmp_path / "run",
                    "prompts.jsonl",
                    wanted,
                    f"model.name_or_path={broken}",
                )
            )
        assert str(caught.value).startswith(f"override `{wanted}`: ")
    with pytest.raises(
        ConfigError,
        match=r"^override `rewards\.0\.weight=2`: `rewards\.0`: a reward has exactly one of function, ",
    ):
        recipe(world, tmp_path / "run", "prompts.jsonl", "rewards.0.weight=2")


def test_sections_that_are_not_used_are_said(world, tmp_path, capsys):
    run_recipe(recipe(world, tmp_path / "run", "pairs.jsonl", "target.kind=ema", "train.steps=1"))
    assert "`target` is set in the recipe, but this objective does not use it" in " ".join(
        capsys.readouterr().err.split()
    )


def test_evaluation_epochs_and_the_card(world, tmp_path):
    changes = [
        "train.steps=null",
        "train.epochs=2",
        "train.eval_every=2",
        f"data.eval={world / 'held_out.jsonl'}",
    ]
    weighted = "objective=[{name: dpo, beta: 0.3}, {name: sft, weight: 0.5}]"
    result = run_recipe(recipe(world, tmp_path / "run", "pairs.jsonl", weighted, *changes))
    assert result.step == 5  # 2 epochs of 10 pairs by 4
    assert [
        row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in row
    ] == [2, 4, 5]
    card = (tmp_path / "run" / "README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["alignkit", "dpo", "sft"],
    }
    for words in (
        "| DPO | 1 | weighting = none, beta = 0.3,",
        "| SFT | 0.5 |",
        "arXiv:2305.18290",
        "10 rows read, 10 kept",
        "| eval_loss | ",
    ):
        assert words in body
    assert "trust_remote_code`" not in body


def test_a_short_run_scores_the_rows_that_it_visits_alone(world, tmp_path, capsys):
    """Of 10 rows one step of 4 needs 4, and a whole epoch all of them; the first step is the same."""
    losses = []
    for steps, bundles in [(1, 4), (3, 10)]:
        given = (f"train.steps={steps}", "train.schedule=constant", "objective.beta=0.5")
        run_recipe(recipe(world, tmp_path / str(steps), "pairs.jsonl", *given))
        said = " ".join(capsys.readouterr().err.split())
        assert f"reference log-probs stored for {bundles} bundles" in said
        losses.append(read_jsonl(tmp_path / str(steps) / "metrics.jsonl")[0]["loss"])
    assert losses[0] == losses[1]


def test_the_card_says_that_a_model_runs_code_of_its_own():
    remote = load_recipe("dpo", ["model.trust_remote_code=true", "model.adapter.r=4"])
    card = model_card(remote, build_objective(remote.objective), [])({})
    assert "runs code of its own (`trust_remote_code`)" in card
    assert "library_name: peft" in card


def test_the_card_shows_paths_and_rows_and_obeys_none_of_them():
    hostile = load_recipe("dpo", ["model.name_or_path=a<img src=x>|b[c](d)"])
    rows = ["```", "<script>alert(1)</script>", "\x1b[2J"]
    card = model_card(hostile, build_objective(hostile.objective), rows)({})
    assert "# a&lt;img src=x>|b[c]\\(d), trained with alignkit" in card
    assert "\n````\n```\n<script>alert(1)</script>\n\\x1b[2J\n````\n" in card
    assert "\x1b" not in card


def test_lora_and_merge(world, tmp_path):
    from alignkit.policies.folding import merge
    from alignkit.runs.trained_model import load_finished

    run_recipe(
        recipe(
            world, tmp_path / "run", "pairs.jsonl", "model.adapter.r=2", "train.learning_rate=0.1"
        )
    )
    merge(tmp_path / "run", tmp_path / "merged")
    adapted, merged = load_finished(str(tmp_path / "run")), load_finished(str(tmp_path / "merged"))
    ids = adapted.tokenizer("w3 w4", return_tensors="pt").input_ids
    assert (adapted.network(ids).logits - merged.network(ids).logits).abs().max() < 1e-5
    base = load_finished(str(world / "model"))
    assert (adapted.network(ids).logits - base.network(ids).logits).abs().max() > 1e-3


def test_unknown_trackers_are_said(world, tmp_path):
    with pytest.raises(
        ConfigError, match=r"^override `trackers=\[swanlab\]`: `trackers`: swanlab is not installed"
    ):
        run_recipe(recipe(world, tmp_path / "run", "pairs.jsonl", "trackers=[swanlab]"))


def test_trackers_get_every_row(world, tmp_path, monkeypatch):
    from accelerate import Accelerator

    sent = []
    monkeypatch.setattr(
        Accelerator, "log", lambda self, row, step: sent.append((step, row["loss"]))
    )
    run_recipe(recipe(world, tmp_path / "run", "pairs.jsonl"))
    assert sent == [
        (row["step"], row["loss"]) for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")
    ]


EMBEDDED = [name for name in sorted(shipped_recipes()) if load_recipe(name).data.task_source()]


def in_a_size_for_tests(train):
    """`data.train` of a recipe on the small world of its task."""
    if isinstance(train, str):
        return train.removesuffix("_small") + "_small"
    streams = [stream.model_dump(exclude_none=True) for stream in train]
    tasks = ("source", "eval")
    small = [{k: f"{v}_small" if k in tasks else v for k, v in s.items()} for s in streams]
    return json.dumps(small)


@pytest.mark.long
@pytest.mark.parametrize("name", EMBEDDED)
def test_every_shipped_recipe_runs_on_its_task(name, tmp_path):
    data = load_recipe(name).data
    task = data.task_source().removesuffix("_small") + "_small"
    small = [
        "train.steps=2",
        "train.batch_size=4",
        "train.log_samples_every=2",
        "train.epochs=null",
    ]
    small += [f"data.eval={task}"] if data.eval else []
    small.append(f"data.train={in_a_size_for_tests(data.train)}")
    recipe = load_recipe(name, [f"output_dir={tmp_path / name}", *small])
    result = run_recipe(recipe)
    assert result.step == 2
    writes = not build_objective(
        recipe.objective
    ).plan.outputs  # reward and preference models score, they write nothing
    assert [row["step"] for row in read_jsonl(tmp_path / name / "samples.jsonl")][::4] == (
        [0, 2] if writes else []
    )


def test_the_package_itself_loads_and_runs_recipes(world, tmp_path):
    paths = [
        f"model.name_or_path={world / 'model'}",
        f"data.train={world / 'pairs.jsonl'}",
        f"output_dir={tmp_path / 'run'}",
    ]
    result = alignkit.run_recipe(alignkit.load_recipe("dpo", [*paths, "train.steps=1"]))
    assert result.step == 1
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_processes_wait_as_long_as_the_recipe_says():
    handler = make_accelerator(load_recipe("dpo", ["train.process_timeout=5"])).init_handler
    assert handler.timeout == timedelta(seconds=5)
