"""A neural policy on the cyclic game: its exact duality gap falls. The table of all objectives:
docs/results.
"""

from pathlib import Path

import pytest

from alignkit.config.recipe import load_recipe
from alignkit.oracles import duality_gap
from alignkit.runs.launch import run_recipe
from alignkit.tasks import resolve
from alignkit.tasks.cyclic import preference_table
from alignkit.tasks.exact import folder_logps
from alignkit.tasks.reviews import REVIEWS


def gap_ratio(world_name: str, run: Path, beta: float) -> float:
    """Exact duality gap of the base model over that of the run's model, means over the prompts."""
    world, folders = REVIEWS[world_name], (resolve(world_name).model_folder, run / "model")
    policies = [
        folder_logps(folder, world.prompts, list(world.rewards)).exp() for folder in folders
    ]
    before, after = (
        duality_gap(preference_table(world_name), policies[0], p, beta).mean() for p in policies
    )
    return float(before / after)


@pytest.mark.long
def test_egpo_lowers_the_exact_gap_in_seconds(small_task, tmp_path):
    run = [
        "data.train=task:cyclic_small",
        f"output_dir={tmp_path}",
        "rollout.max_new_tokens=8",
        "train.log_samples_every=0",
    ]
    run_recipe(
        load_recipe(
            "egpo", [*run, "train.steps=60", "train.batch_size=128", "train.learning_rate=1.0e-3"]
        )
    )
    # 1.698 on one processor, a little more on another
    assert gap_ratio("reviews_small", tmp_path, 0.1) > 1.6


@pytest.mark.slow
def test_the_shipped_egpo_recipe_lowers_the_exact_gap_ten_times(tmp_path):
    run_recipe(load_recipe("egpo", [f"output_dir={tmp_path}"]))
    assert gap_ratio("reviews", tmp_path, 0.1) > 10
