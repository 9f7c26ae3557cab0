"""The demo on the small world: it runs, and what it prints is what it computed."""

import re
import runpy
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "demo.py"


def test_demo_prints_samples_and_exact_figures(tmp_path, capsys):
    overrides = [
        "data.train=task:reviews_small",
        f"output_dir={tmp_path / 'run'}",
        "objective.beta=1",
        "train.steps=40",
        "train.batch_size=16",
        "train.log_samples_every=0",
    ]
    found = runpy.run_path(str(EXAMPLE))["main"]("dpo", *overrides)
    printed = capsys.readouterr().out
    assert len(re.findall(r"the (comedy|western) about", printed)) == 4
    for title, value in (
        ("expected reward", found.reward),
        ("KL to the base", found.kl),
        ("outside the gr", found.outside),
    ):
        line = next(line for line in printed.splitlines() if title in line)
        assert f"{value:.4f}" in line
    assert found.kl > 0.01
    assert 0 < found.share < 1
    assert (tmp_path / "run" / "model" / "config.json").exists()
    assert str(tmp_path / "run" / "model") in printed
