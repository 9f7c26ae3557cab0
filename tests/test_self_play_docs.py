"""The code in docs/self_play.md and docs/judges.md runs as it stands, the judges of their recipes are
accepted, and the table of objectives names shipped recipes.
"""

import re
import runpy
from pathlib import Path

import pytest
import torch
import yaml

from alignkit.config import build_objective, load_recipe
from alignkit.judges import JudgeConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = "".join((DOCS / name).read_text() for name in ("self_play.md", "judges.md"))


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_code_runs_from_top_to_bottom(tmp_path):
    (tmp_path / "page.py").write_text("\n".join(blocks("python")))
    names = runpy.run_path(str(tmp_path / "page.py"))
    assert names["equilibrium"].tolist() == pytest.approx([0.4321, 0.2303, 0.3376], abs=5e-5)
    shorter = names["judge"](["p"], ["a"], ["longer"]).probability
    torch.testing.assert_close(shorter, torch.tensor([0.8], dtype=torch.float64))
    assert names["old"].judge(["p", "p"], [["a", "longer"], ["longer", "a"]]) == [0, 1]
    assert torch.equal(names["new"](["p"], ["a"], ["longer"]).probability, shorter)


def test_every_judge_of_the_page_is_one():
    (block,) = blocks("yaml")
    kinds = [
        JudgeConfig.model_validate(yaml.safe_load(line)["judge"]) for line in block.splitlines()
    ]
    assert [
        len(kind.model_fields_set & {"function", "rewards", "chat", "trl", "model"})
        for kind in kinds
    ] == [1] * 5


def test_the_table_tells_how_often_the_judge_is_asked():
    """One question per sample against the opponent, or between two samples; both halves of an
    extragradient step.
    """
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| (\d)", PAGE, flags=re.MULTILINE)
    assert [name for name, _ in rows] == ["egpo", "nash_mp", "online_ipo", "nash_md", "ipo_md"]
    for name, questions in rows:
        plan = build_objective(load_recipe(name).objective).plan
        samples = sum(draw.n for draw in plan.samples if draw.scored)
        against = samples if any(not draw.scored for draw in plan.samples) else samples - 1
        assert int(questions) == against * (2 if plan.update == "extragradient" else 1), name
