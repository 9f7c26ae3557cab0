"""The agent with a calculator: it learns to call it where that pays."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "agent.py"


@pytest.mark.long
def test_the_policy_calls_where_a_call_pays(tmp_path, capsys):
    share = runpy.run_path(str(EXAMPLE))["main"](tmp_path)
    printed = capsys.readouterr().out
    assert share["never taught"] == 0
    assert 0 < share["taught"] < 0.5
    assert share["a call costs 0.2"] > 0.8
    assert share["a call costs 0.95"] < share["taught"]
    assert "policy     =\nworld      " in printed  # an episode in which it calls
