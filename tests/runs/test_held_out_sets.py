"""`data.eval` as several named sets: each is measured as it is alone, under its own name."""

import json

import pytest
from world import SHORT_RUN, pair_rows, run, save_model, write_rows

import alignkit
from alignkit.config import load_recipe
from alignkit.config.data import DataConfig
from alignkit.data.held_out import unlike_trained
from alignkit.errors import ConfigError, DataError
from alignkit.files import read_jsonl
from alignkit.runs.launch import run_recipe

SETTINGS = {**SHORT_RUN, "steps": 2, "eval_every": 1, "save_every": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    rows = pair_rows(13)
    write_rows(folder / "pairs.jsonl", rows[:8])
    write_rows(folder / "near.jsonl", rows[8:10])
    parts = {"train": rows[:4], "test": rows[10:], "other": rows[8:10]}
    (folder / "far.json").write_text(json.dumps(parts))
    return folder


def evaluations(world, out, held_out, *overrides, objective="dpo"):
    settings = [f"train.{name}={value}" for name, value in SETTINGS.items()]
    places = [f"model.name_or_path={world / 'model'}", f"output_dir={out}"]
    data = [f"data.train={world / 'pairs.jsonl'}", f"data.eval={held_out}"]
    run_recipe(load_recipe(objective, [*places, *data, *settings, *overrides]))
    rows = read_jsonl(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k.startswith("eval_")} for row in rows]


@pytest.mark.parametrize("objective", ["dpo", "reward_model"])
def test_each_set_is_measured_as_it_is_alone(world, tmp_path, objective):
    sets = f"{{near: {world}/near.jsonl, far: {{source: {world}/far.json, max_rows: 2}}}}"
    both = evaluations(world, tmp_path / "both", sets, objective=objective)
    near = evaluations(world, tmp_path / "near", world / "near.jsonl", objective=objective)
    write_rows(tmp_path / "far.jsonl", pair_rows(13)[10:12])
    far = evaluations(world, tmp_path / "far", tmp_path / "far.jsonl", objective=objective)

    for together, alone_near, alone_far in zip(both, near, far):
        expected = {k.replace("eval_", "eval_near_"): v for k, v in alone_near.items()}
        expected |= {k.replace("eval_", "eval_far_"): v for k, v in alone_far.items()}
        assert together == expected
    assert both[0]["eval_near_loss"] != both[0]["eval_far_loss"] or objective == "dpo"
    recorded = load_recipe(tmp_path / "both" / "recipe.yaml")
    assert recorded.train.metric == "eval_near_loss"  # of the first
    assert recorded.train.metric_goal == "min"


def test_prompts_are_answered_set_by_set(world, tmp_path):
    def n_of(completions, n, **columns):
        return [float(value) for value in n]

    def prompts(first, count, value):
        return [{"prompt": f"w{first + i} w4", "n": value} for i in range(count)]

    settings = {**SETTINGS, "steps": 1}
    trained = alignkit.train(
        alignkit.RLOO(), model=world / "model", data=prompts(3, 4, 1), rewards=n_of,
        eval_data={"hard": prompts(7, 2, 5), "easy": {"source": prompts(9, 3, 7), "max_rows": 1}},
        output_dir=tmp_path, completions=2, max_new_tokens=3, **settings,
    )  # fmt: skip
    row = trained.metrics.iloc[-1]
    assert row["eval_hard_reward"] == 5
    assert row["eval_easy_reward"] == 7
    recorded = load_recipe(tmp_path / "recipe.yaml")
    assert recorded.train.metric == "eval_hard_reward"
    assert recorded.train.metric_goal == "max"


def test_each_set_has_its_own_split(world, tmp_path):
    file = world / "far.json"
    sets = f"{{one: {file}, two: {{source: {file}, split: other}}}}"
    evaluations(world, tmp_path / "run", sets)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "far.json: 3 rows read" in card  # test, the first split that is held out
    assert "far.json: 2 rows read" in card


@pytest.mark.parametrize(
    ("held_out", "error", "match"),
    [
        ("{}", ConfigError, r"`data.eval` is \{\}"),
        ("{'': near.jsonl}", ConfigError, "no name for held-out rows"),
        ("{a/b: near.jsonl}", ConfigError, "no name for held-out rows"),
        (
            "{a: {sourc: near.jsonl}}",
            ConfigError,
            "`data.eval.a.source` is missing\n.*`data.eval.a.sourc` .*Did you mean `source`",
        ),
        ("[near.jsonl]", ConfigError, "should be a mapping"),
        ("{a: 3}", ConfigError, r"`data.eval.a` is 3; it should be text"),
        ("{a: near.jsonl, b: neer.jsonl}", DataError, "near.jsonl is there"),
        (
            "{a: {source: far.json, split: x}}",
            DataError,
            "no split `x`; the splits are train, test",
        ),
        ("{a: 'task:reviews', b: 'task:nothing'}", ConfigError, "no task `nothing`|two tasks"),
    ],
)
def test_bad_sets_get_a_sentence(world, tmp_path, monkeypatch, held_out, error, match):
    monkeypatch.chdir(world)
    with pytest.raises(error, match=match):
        evaluations(world, tmp_path / "run", held_out)
    assert not (tmp_path / "run").exists()


def test_two_sets_of_one_name_are_refused(world, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text("data:\n  eval:\n    a: one.jsonl\n    a: two.jsonl\n")
    assert run("train", file) == 2
    assert "mine.yaml:4: not valid YAML: found duplicate key a" in capsys.readouterr().err


def test_a_metric_of_a_named_set_has_the_goal_of_its_kind(world):
    def goal(metric):
        train = load_recipe("dpo", [f"train.metric={metric}"]).train
        return train.goal_of(metric)

    assert goal("eval_near_loss") == "min"
    assert goal("eval_near_rewards/accuracies") == "max"
    assert goal("eval_accuracy") == "max"
    with pytest.raises(ConfigError, match="not known"):
        goal("eval_near_words")


def refusal_of(recipe, *overrides, out):
    with pytest.raises(DataError) as refused:
        run_recipe(load_recipe(recipe, [f"output_dir={out}", *overrides]))
    assert not out.exists()
    return str(refused.value)


@pytest.mark.parametrize("recipe", ["haf_rm", "reward_model"])
def test_a_refusal_of_the_recipes_own_held_out_rows_names_the_field(world, tmp_path, recipe):
    own = [f"model.name_or_path={world / 'model'}", f"data.train={world / 'pairs.jsonl'}"]
    said = refusal_of(recipe, *own, out=tmp_path / "run")
    assert "chosen equals rejected" in said
    assert "these are the held-out rows, data.eval (task:reviews): set it to rows like" in said
    assert "data.eval_split" in said

    # The same of rows that are trained on says nothing of held-out ones.
    same = write_rows(tmp_path / "same.jsonl", [{**pair_rows(1)[0], "chosen": "w7"}] * 3)
    said = refusal_of(recipe, own[0], f"data.train={same}", out=tmp_path / "run")
    assert "held-out" not in said


LONG = " ".join(["w5"] * 150)  # beyond the 128 positions of the model


@pytest.mark.parametrize(
    ("recipe", "row"),
    [
        ("dpo", {"prompt": "w3", "chosen": "w4", "rejected": "w4"}),
        ("haf_rm", {"prompt": "w3", "chosen": LONG, "rejected": "w4"}),  # cut, without an end token
        ("reward_model", {"prompt": "w3", "chosen": LONG, "rejected": "w4"}),  # positions
        ("rloo", {"prompt": LONG}),
        ("dpo", {"question": "w3"}),
    ],
    ids=["equal", "cut", "positions", "room", "columns"],
)
def test_other_refusals_name_the_set(world, tmp_path, recipe, row):
    rows = [{"prompt": f"w{3 + i}"} for i in range(3)] if recipe == "rloo" else pair_rows(3)
    trained = write_rows(tmp_path / "rows.jsonl", rows)
    held = write_rows(tmp_path / "held.jsonl", [row])
    (tmp_path / "worth.py").write_text(
        "def worth(completions, **_):\n    return [0.0] * len(completions)\n"
    )
    settings = [
        f"model.name_or_path={world / 'model'}",
        f"data.train={trained}",
        f"data.eval={{far: {held}}}",
        f"data.max_length={100 if recipe == 'haf_rm' else 1024}",
    ]
    if recipe == "rloo":
        settings.append(f"rewards.0.function={tmp_path / 'worth.py'}:worth")
    said = refusal_of(recipe, *settings, out=tmp_path / "run")
    assert f"these are the held-out rows, data.eval.far ({held}): set it" in said


def test_a_refusal_of_a_streams_held_out_rows_names_the_stream(world, tmp_path):
    held = write_rows(tmp_path / "held.jsonl", [{"prompt": "w3", "chosen": "w4", "rejected": "w4"}])
    pairs = world / "pairs.jsonl"
    (tmp_path / "two.yaml").write_text(
        f"""
model: {{name_or_path: {world / "model"}}}
data:
  train:
    - {{source: {pairs}, objective: {{name: dpo}}, share: 1, eval: {held}}}
    - {{source: {pairs}, objective: {{name: sft}}, share: 1}}
"""
    )
    said = refusal_of(tmp_path / "two.yaml", "train.steps=1", out=tmp_path / "run")
    assert said.startswith("stream `dpo`: ")
    assert f"`eval` of the stream dpo ({held}): set it to rows like those of its source" in said
    assert "data.eval" not in said


def test_held_out_rows_of_a_task_that_is_not_trained_on_are_noted():
    def noted(trained, held_out):
        return unlike_trained(DataConfig(train=trained, eval=held_out))

    (note,) = noted("mine.jsonl", "task:reviews")
    assert "task:reviews, of which nothing is trained on; set data.eval to" in note
    assert note.endswith("or set it to null")
    (note,) = noted("mine.jsonl", {"near": "held.jsonl", "far": "task:reviews"})
    assert "set data.eval.far to" in note
    assert note.endswith("or leave it out")
    assert noted("task:reviews", "task:reviews") == noted("mine.jsonl", "held.jsonl") == []


def test_held_out_rows_that_are_all_trained_on_are_refused_from_python_too(world, tmp_path):
    rows = pair_rows(4)
    with pytest.raises(DataError, match=r"so nothing is held out; .* these are the held-out rows"):
        alignkit.train(
            alignkit.DPO(),
            model=world / "model",
            data=rows,
            eval_data=rows[:2],
            output_dir=tmp_path / "run",
            steps=1,
        )
