"""The `compare` section: what runs it makes, and what it refuses before anything is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

from alignkit.comparison.grid import expand
from alignkit.config import build_objective, load_recipe
from alignkit.errors import ConfigError

RECIPE = """\
model: {name_or_path: task}
data: {train: "task:reviews"}
train: {steps: 50, batch_size: 8}
compare:
  grid:
    dpo: {beta: [0.5, 1.0]}
    soft: {name: hdpo, beta: 1.0, alpha: [0.9, 1.1]}
    rloo: {beta: 0.5}
  overrides:
    rloo:
      train: {steps: 20}
      rollout: {completions: 4}
  seeds: [0, 7]
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text=RECIPE, *changes):
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        Path("mine.yaml").write_text(text)
        return "mine.yaml"

    return write


def refusal(*args):
    with pytest.raises(ConfigError) as caught:
        expand(load_recipe(*args))
    return str(caught.value)


def test_lists_of_values_and_seeds_make_runs(write):
    points = expand(load_recipe(write(), ["output_dir=out"]))
    assert [p.name for p in points] == [
        "dpo-beta=0.5-seed=0", "dpo-beta=0.5-seed=7", "dpo-beta=1.0-seed=0", "dpo-beta=1.0-seed=7",
        "soft-alpha=0.9-seed=0", "soft-alpha=0.9-seed=7", "soft-alpha=1.1-seed=0", "soft-alpha=1.1-seed=7",
        "rloo-seed=0", "rloo-seed=7",
    ]  # fmt: skip
    soft = points[5]
    assert soft.recipe.objective == {"name": "hdpo", "beta": 1.0, "alpha": 0.9}
    assert (soft.label, soft.swept, soft.seed, soft.recipe.train.seed) == (
        "soft",
        {"alpha": 0.9},
        7,
        7,
    )
    assert soft.recipe.output_dir == "out/runs/soft-alpha=0.9-seed=7"
    assert (soft.recipe.train.steps, points[-1].recipe.train.steps) == (50, 20)
    assert (points[-1].recipe.train.batch_size, points[-1].recipe.rollout.completions) == (8, 4)
    assert {p.recipe.reference.store for p in points} == {"out/reference"}
    assert all(p.recipe.compare is None for p in points)


def test_the_hash_is_of_what_decides_the_run(write):
    first = expand(load_recipe(write(), ["output_dir=out"]))
    again = expand(load_recipe(write(), ["output_dir=elsewhere", "compare.samples=3"]))
    longer = expand(load_recipe(write(), ["output_dir=out", "train.steps=60"]))
    assert [p.hash for p in first] == [p.hash for p in again]
    assert len({p.hash for p in first}) == len(first)
    # rloo has its own steps
    assert all((a.hash == b.hash) == (a.label == "rloo") for a, b in zip(first, longer))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("    dpo: {", "    dpoo: {"), "mine.yaml:6: there is no objective `dpoo`. Did you mean `dpo`? Allowed: sft, iq_imitation, dpo"),
        (("name: hdpo", "name: [hdpo]"), "mine.yaml:7: `compare.grid.soft.name` is ['hdpo']; it should be text"),
        (("[0.5, 1.0]", "[]"), "mine.yaml:6: `compare.grid.dpo.beta` is an empty list"),
        (("[0.5, 1.0]", "[0.5, 0.5]"), "mine.yaml:6: two runs of the grid are `dpo-beta=0.5-seed=0`; name the values once"),
        (("    rloo:\n", "    rlo:\n"), "mine.yaml:10: `compare.overrides.rlo`: the grid has no `rlo`. Did you mean `rloo`?"),
        (
            ("train: {steps: 20}", "train: {step: 20}"),
            "mine.yaml:11: `compare.overrides.rloo.train.step` is not a field of `compare.overrides.rloo.train`. Did you mean",
        ),
        (("{steps: 20}", "{steps: -1}"), "mine.yaml:11: `compare.overrides.rloo.train.steps` is -1; it should be greater than 0"),
        (("{steps: 20}", "{seed: 3}"), "mine.yaml:11: seeds are given by `compare.seeds`, for all alike"),
        (("rollout: {comp", "rolout: {comp"), "mine.yaml:12: `compare.overrides.rloo.rolout` cannot differ between the runs"),
        (("  seeds:", "  seed:"), "mine.yaml:13: `compare.seed` is not a field of `compare`. Did you mean `seeds`?"),
        (("[0, 7]", "[]"), "mine.yaml:13: `compare.seeds` is []; it should be not empty."),
    ],
)  # fmt: skip
def test_faults_are_told_with_their_line(write, change, words):
    assert refusal(write(RECIPE, change)).startswith(words)


def test_a_recipe_without_the_section(write):
    assert "mine.yaml: the recipe has no `compare` section" in refusal(
        write(RECIPE[: RECIPE.index("compare:")])
    )


def test_the_fields_of_objectives_are_checked_with_their_line(write):
    recipe = load_recipe(write(RECIPE, ("alpha:", "alfa:")))
    with pytest.raises(
        ConfigError,
        match=r"mine\.yaml:7: `compare\.grid\.soft\.alfa` is not a field of .*Did you mean `alpha`",
    ):
        build_objective(
            expand(recipe)[4].recipe.objective, recipe.origin, keys=("compare", "grid", "soft")
        )


def test_checking_a_grid_imports_no_torch(write):
    code = "import sys; from alignkit.config.recipe import load_recipe; from alignkit.comparison.grid import expand; "
    code += f"assert len(expand(load_recipe('{write()}'))) == 10; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
