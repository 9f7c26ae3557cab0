"""`alignkit fit-target`: from a model and features to the recipe's overrides."""

import pytest
import torch
from world import save_model, write_rows

from alignkit.cli.main import main
from alignkit.config import load_recipe
from alignkit.errors import ConfigError
from alignkit.runs.target import TargetRequest, as_overrides, fit_target, parse_constraint

FEATURES = """
def begins_early(prompts, completions, completion_ids, **columns):
    return [float(ids[0] < 12) for ids in completion_ids]

def long(prompts, completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    write_rows(folder / "prompts.jsonl", [{"prompt": f"w{i} w{i + 1}"} for i in range(3, 6)])
    (folder / "features.py").write_text(FEATURES)
    return folder


def test_the_overrides_make_a_recipe_whose_target_has_the_means(world, capsys):
    begins, long = (f"{world / 'features.py'}:{name}" for name in ("begins_early", "long"))
    request = TargetRequest(
        str(world / "model"), str(world / "prompts.jsonl"), [begins, long], [0.7, 3.5], 200, 4
    )
    fit = fit_target(request)
    wanted = torch.tensor([0.7, 3.5], dtype=torch.float64)
    torch.testing.assert_close(fit.moments, wanted, rtol=0, atol=1e-9)
    recipe = load_recipe("fdpg", as_overrides(request, fit))
    assert [r.weight for r in recipe.rewards] == fit.lambdas.tolist()

    command = ["fit-target", str(world / "model"), str(world / "prompts.jsonl")]
    command += ["--feature", f"{begins}=0.7", "--samples", "200", "--max-new-tokens", "4"]
    with pytest.raises(SystemExit, match="0"):
        main(command)
    printed = capsys.readouterr().out
    assert "0.7 under the target" in printed
    assert "alignkit train fdpg objective.beta=1 'rewards=[{" in printed


def test_what_is_no_constraint(world):
    for text in ("features.py:long", "features.py:long=much", "long=3", "features.py:long=inf"):
        with pytest.raises(ConfigError, match="is no constraint; give FILE"):
            parse_constraint(text)
    for features, message in (((), "no constraint"), (("a:b", "a:b"), "given twice")):
        with pytest.raises(ConfigError, match=message):
            TargetRequest("m", "p", features, [1.0] * len(features))
