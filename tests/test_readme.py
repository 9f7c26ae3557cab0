"""What the README says of the registry and the recipes is true."""

import re
from importlib import import_module
from pathlib import Path

from alignkit.config import build_objective, load_recipe
from alignkit.objectives import OBJECTIVES, locate
from alignkit.testing import check_objective

README = Path(__file__).resolve().parents[1].joinpath("README.md").read_text()


def test_the_table_of_objectives_is_the_registry():
    expected = []
    for name in OBJECTIVES:
        module, cls, _ = locate(name)
        expected.append(f"| `{name}` | `{cls}` | {getattr(import_module(module), cls).paper} |")
    assert re.findall(r"^\| `\w+` \| `\w+` \| .*$", README, re.M) == expected


def test_the_objective_of_ones_own_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = next(
        block
        for block in re.findall(r"```python\n(.*?)```", README, re.S)
        if "my_losses.py" in block
    )
    Path("my_losses.py").write_text(code)
    override = re.search(r'alignkit train dpo "(objective=.*?)"', README)[1]
    objective = build_objective(load_recipe("dpo", [override]).objective)
    assert objective.margin == 2.0
    check_objective(objective)
