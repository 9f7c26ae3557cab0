"""The live table: what it says of each run, and how long the rest will take."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from alignkit.comparison import live_table as live
from alignkit.comparison.grid import expand
from alignkit.comparison.live_table import LiveTable
from alignkit.comparison.run_state import RunState
from alignkit.config.recipe import load_recipe

RECIPE = """
train: {steps: 40}
compare: {grid: {dpo: {beta: [0.1, 0.2, 0.3]}, ipo: {tau: [0.1, 0.2]}}}
"""


@pytest.fixture
def points(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(RECIPE)
    return expand(load_recipe("mine.yaml"))


def log(point, *rows, torn=""):
    file = Path(point.recipe.output_dir) / "metrics.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    return file


def shown(points, processes=2, terminal=True):
    out = io.StringIO()
    return LiveTable(
        points, processes, Console(file=out, force_terminal=terminal, width=110, height=30)
    ), out


def test_the_table_says_what_each_run_does_and_estimates_the_rest(points, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    RunState("finished", seconds=60.0, settings=points[0].settings).write(
        Path(points[0].recipe.output_dir)
    )
    log(points[0], {"step": 40, "loss": 0.5})
    RunState("failed", "the reward\nraised", settings=points[3].settings).write(
        Path(points[3].recipe.output_dir)
    )
    table, out = shown(points)
    log(points[1], {"step": 10, "loss": 0.61}, torn='{"step": 1')
    table.watch([points[1]])
    clock[0] += 20
    with table:
        table.watch([points[1]])
    text = out.getvalue()
    for words in (
        "1 failed, 1 running, 1 finished, 2 waiting",
        "10/40",
        "loss 0.61",
        "the reward",
        "1 min 00 s",
    ):
        assert words in text, words
    # dpo: a run of 60 s and one of 20 s for a quarter: 70 s each on average; left 70 - 20, 70, and
    # 70 for ipo, by two workers
    assert "ETA 1 min 35 s" in text


def test_a_log_gets_a_line_per_change(points):
    table, out = shown(points, terminal=False)
    with table:
        table.watch([points[0]])
        table.watch([points[0]])
        RunState("finished", seconds=30.0, settings=points[0].settings).write(
            Path(points[0].recipe.output_dir)
        )
        table.watch([])
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[0] == "[0/5] dpo-beta=0.1-seed=0: running"
    assert lines[1].startswith("[1/5] dpo-beta=0.1-seed=0: finished")
    assert lines[1].endswith("ETA 1 min 00 s")  # four more of 30 s by two workers
    assert len(lines) == 2


def test_more_runs_than_lines(points):
    table, _ = shown(points)
    table.console = Console(file=io.StringIO(), force_terminal=True, width=100, height=9)
    table.watch([points[4]])
    out = Console(file=io.StringIO(), width=100, height=40)
    out.print(table._table())
    text = out.file.getvalue()
    assert "ipo-tau=0.2-seed=0" in text  # at work: never hidden
    assert "... and 1 more" in text
    assert "ETA not known yet" in text
