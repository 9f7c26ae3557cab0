"""A process of four holds its shards of a model, and one unit while it is gathered."""

import json
import sys
from pathlib import Path

import pytest
from two_processes import run_to_its_end

BENCH = Path(__file__).parents[1] / "benchmarks" / "bench_shards.py"


@pytest.mark.long
def test_nobody_holds_more_than_its_shards_and_a_unit(tmp_path):
    file = tmp_path / "figures.json"
    command = [sys.executable, str(BENCH), "--allocated", str(file)]
    code, said = run_to_its_end(command, timeout=400)
    assert code == 0, said[-3000:]

    figures = json.loads(file.read_text())
    assert figures["model"] == pytest.approx(399, abs=1)
    assert max(figures[phase] for phase in ("load", "score", "save")) <= figures["allowed"]
    # a shard at least: the counting works
    assert min(figures[phase] for phase in ("load", "score", "save")) > figures["model"] / 4
