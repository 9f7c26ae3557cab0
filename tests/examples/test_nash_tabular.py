"""The tabular example runs, prints the table and draws the picture."""

import runpy
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "nash_tabular.py"


def test_nash_tabular(tmp_path, monkeypatch, capsys):
    picture = tmp_path / "gaps.png"
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--out", str(picture), "--questions", "100"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = [line for line in capsys.readouterr().out.splitlines() if " 100 " in line]
    gaps = {line[:16].strip(): float(line.split()[-1]) for line in rows}
    assert len(gaps) == 13
    assert gaps["EGPO"] == gaps["Nash-MP"] == min(gaps.values())
