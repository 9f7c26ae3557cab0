"""Recipes whose policy takes turns: environments of a file in processes apart, faults in a run, chats
with tools, what is refused.
"""

import json

import pytest
from world import run, save_model

from alignkit.config.recipe import load_recipe
from alignkit.errors import ConfigError
from alignkit.files import read_jsonl
from alignkit.runs.launch import run_recipe

WORLD = '''
import os, time

class Echo:
    """Says the last word again; some words are dangerous."""

    def reset(self, **row):
        self.turn = 0

    def state(self):
        return str(self.turn)

    def step(self, text):
        self.turn += 1
        words = text.split() or ["w3"]
        if DANGER and "w8" in words:
            time.sleep(60)
        if DANGER and "w9" in words:
            raise RuntimeError("nine")
        if DANGER and "w10" in words:
            return "x" * (1 << 20), 0.0, False
        if DANGER and "w11" in words:
            return [], "none", None
        if DANGER and "w12" in words:
            os.fork()
        return f" {words[-1]}", float(words.count("w5")), self.turn == 3

DANGER = False

class Danger(Echo):
    def step(self, text):
        global DANGER
        DANGER = True
        return super().step(text)

class NoReward:
    def reset(self, **row):
        pass

def search(query: str) -> str:
    """Searches.

    Args:
        query: for what
    """
    return query
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    (folder / "worlds.py").write_text(WORLD)
    for name, start in (("train", 3), ("eval", 10)):
        rows = [{"prompt": f"w{start + i} w4"} for i in range(5)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(folder, out, environment="Echo", *more, objective="grpo", **rollout):
    settings = {"completions": 4, "max_new_tokens": 40, "turns": 3, **rollout}
    if environment:
        settings["environment"] = f"{folder / 'worlds.py'}:{environment}"
    path = out.with_suffix(".yaml")
    path.write_text(f"""
model: {{name_or_path: {folder / "model"}}}
data: {{train: {folder / "train.jsonl"}, eval: {folder / "eval.jsonl"}, format: prompt}}
objective: {{name: {objective}}}
train: {{steps: 2, batch_size: 3, eval_every: 2, save_every: 0, log_samples_every: 1}}
rollout: {json.dumps(settings)}
output_dir: {out}
""")
    return path, list(more)


def test_a_run_with_an_environment_shows_its_episodes_turn_by_turn(folder, tmp_path):
    path, more = recipe(folder, tmp_path / "run")
    run_recipe(load_recipe(path, more))
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert all(1 < row["episodes/turns"] <= 3 for row in rows)
    assert all(row["episodes/failed"] == 0 for row in rows)
    assert "eval_reward" in rows[-1]
    shown = read_jsonl(tmp_path / "run" / "samples.jsonl")
    several = [row for row in shown if len(row["turns"]) > 1]
    assert several
    for row in several:
        said, heard = row["turns"][:2]
        assert said["role"] == "assistant"
        assert heard == {"role": "user", "content": f" {(said['content'].split() or ['w3'])[-1]}"}


def test_episodes_that_hang_raise_flood_or_fork_are_set_aside_and_the_run_goes_on(
    folder, tmp_path, caplog
):
    path, more = recipe(folder, tmp_path / "run", "Danger", environment_timeout=1.0)
    run_recipe(load_recipe(path, [*more, "train.log_samples_every=0", "data.eval=null"]))
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2
    assert all(0 < row["episodes/failed"] < 1 for row in rows)
    assert "episodes failed and were set aside" in caplog.text


@pytest.mark.parametrize(
    ("environment", "settings", "objective", "reason"),
    [
        ("NoReward", {}, "grpo", "neither `get_reward` nor `step`"),
        ("Echo", {"tools": ["search"]}, "grpo", "would never be called"),
        ("Missing", {}, "grpo", "has no `Missing`"),
        ("Echo", {}, "nash_md", "compares answers with one another"),
    ],
)
def test_what_cannot_work_is_refused_before_training(
    folder, tmp_path, environment, settings, objective, reason
):
    settings = {k: [f"{folder / 'worlds.py'}:{name}" for name in v] for k, v in settings.items()}
    more = [f"judge.function={folder / 'worlds.py'}:search"] if objective == "nash_md" else []
    path, more = recipe(
        folder, tmp_path / "run", environment, *more, objective=objective, **settings
    )
    with pytest.raises(ConfigError, match=reason):
        run_recipe(load_recipe(path, more))


def test_safe_refuses_environments_and_tools(folder, tmp_path, capsys):
    path, _ = recipe(folder, tmp_path / "run")
    assert run("train", path, "--safe") == 2
    assert "`rollout.environment` would run code that the recipe names" in capsys.readouterr().err
    tools, _ = recipe(folder, tmp_path / "tools", None, tools=["worlds.py:search"])
    assert run("train", tools, "--safe") == 2
    assert "`rollout.tools` would run code" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_generate_plays_episodes_and_prints_them_turn_by_turn(folder, capsys):
    arguments = ("generate", folder / "model", "w3 w4", "--completions", "2", "--turns", "3")
    code = f"{folder / 'worlds.py'}:Echo"
    assert run(*arguments, "--max-new-tokens", "40", "--environment", code) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("prompt     w3 w4") == 2
    assert sum(line.startswith("policy ") for line in lines) > 2
    assert sum(line.startswith("world ") for line in lines) > 0
    assert sum(line.startswith("reward ") for line in lines) == 2
    assert run(*arguments, "--environment", code, "--safe") == 2


def test_an_edited_environment_is_another_run(folder, tmp_path):
    code = tmp_path / "worlds.py"
    code.write_text(WORLD)
    path, _ = recipe(folder, tmp_path / "run")
    path.write_text(path.read_text().replace(str(folder / "worlds.py"), str(code)))
    more = ["train.save_every=1", "train.steps=1", "train.log_samples_every=0", "data.eval=null"]
    run_recipe(load_recipe(path, more))
    code.write_text(WORLD.replace('words.count("w5")', 'words.count("w6")'))
    assert run("train", path, *more, "train.steps=2", "--resume", "auto") == 6
