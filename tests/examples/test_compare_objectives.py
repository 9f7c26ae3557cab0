"""The comparison in Python, in a short form: what it prints is what results.json holds."""

import json
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "compare_objectives.py"
SHORT = [
    "data.train=task:reviews_small",
    "train.steps=60",
    "train.batch_size=32",
    "compare.workers=0",
    "compare.samples=4",
]
SHORT += [
    "compare.grid={dpo: {beta: [0.5, 2.0]}, rpg: {beta: 0.5}}",
    "compare.overrides.rpg.train.steps=10",
]


@pytest.mark.long
def test_the_example_compares_and_prints(tmp_path, capsys):
    found = runpy.run_path(str(EXAMPLE))["main"](tmp_path / "out", *SHORT)
    printed = capsys.readouterr().out
    assert found == json.loads((tmp_path / "out" / "results.json").read_text())
    for curve in found["curves"]:
        for point in curve["points"]:
            assert (
                f"KL {point['kl']['value']:.3f}  expected reward {point['score']['value']:+.3f}"
                in printed
            )
    optimal = found["baselines"]["optimal"]
    assert optimal["score"][0] == pytest.approx(found["base"]["score"]["value"], abs=1e-12)
    dpo = {point["setting"]: point for point in found["curves"][0]["points"]}
    assert dpo["beta=0.5"]["efficiency"] is None or 0 < dpo["beta=0.5"]["efficiency"] <= 1
    assert all(pair["words"] in printed for pair in found["verdicts"]["pairs"])
    assert (tmp_path / "out" / "report.html").exists()
