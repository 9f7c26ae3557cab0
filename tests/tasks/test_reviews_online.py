"""Online objectives on the small reviews: after a few seconds the policy is close to the optimum,
exactly measured.
"""

import pytest

from alignkit.config import build_objective, load_recipe
from alignkit.runs.launch import run_recipe
from alignkit.tasks.exact import figures, folder_logps, outcome_rewards

BUDGET = [
    "data.train=task:reviews_small",
    "train.steps=80",
    "train.batch_size=8",
    "train.learning_rate=1.0e-2",
    "train.ema_decay=0.9",
    "train.save_every=0",
    "train.log_samples_every=0",
    "rollout.completions=32",
    "rollout.max_new_tokens=8",
]


@pytest.mark.long
@pytest.mark.parametrize("name", ["kl_ppo", "rpg", "rloo"])
def test_share_of_the_best_objective(name, small, small_task, tmp_path):
    """J = E[reward] - beta KL(policy || base) from 0 to nearly all of its range; the optimum is
    more than 1 nat away.
    """
    recipe = load_recipe(name, [*BUDGET, f"output_dir={tmp_path / name}"])
    objective = build_objective(recipe.objective)
    run_recipe(recipe)
    completions = list(small.rewards)
    before, after = (
        folder_logps(f, small.prompts, completions)
        for f in (small_task.model_folder, tmp_path / name / "model")
    )
    rewards = outcome_rewards(list(small.rewards.values()), small.outside)
    optimum = objective.optimum(rewards, before)
    start, end, best = (
        figures(policy, before, rewards, optimum=optimum, beta=objective.beta)
        for policy in (before, after, optimum)
    )
    assert best.kl > 1
    assert end.share > 0.98
    assert end.kl_optimum < start.kl_optimum / 50
