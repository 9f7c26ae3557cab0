"""What `make demo` runs: align a small film critic with DPO and check the result against the exact
optimum.

    python examples/demo.py [RECIPE] [section.field=value ...]

The task `reviews` is small enough to list: every review the model can write has a probability we
can compute, so nothing below is an estimate. The recipe's task has to be one of the reviews worlds,
its objective one with a beta and a closed-form optimum.
"""

import sys
import time
from pathlib import Path

from alignkit.distributed.threads import wait_briefly

wait_briefly()  # before torch is imported: on a busy machine threads that turn in a loop are slow

from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.config import build_objective, load_recipe
from alignkit.rollout.generate import OneModel, generate
from alignkit.runs.launch import run_recipe
from alignkit.tasks import resolve
from alignkit.tasks.exact import Figures, figures, folder_logps, outcome_rewards
from alignkit.tasks.reviews import REVIEWS, Reviews


def main(recipe: str = "dpo", *overrides: str) -> Figures:
    """Run the recipe on the reviews and print what it did."""
    console = Console(width=130, markup=False)  # samples may hold [brackets]
    start = time.monotonic()
    folder = f"output_dir=runs/demo-{time.strftime('%Y%m%d-%H%M%S')}"
    loaded = load_recipe(recipe, [folder, *overrides])
    objective = build_objective(loaded.objective)
    world = REVIEWS[loaded.data.train.removeprefix("task:")]

    # 1. The base model and its preference pairs: made on first use by alignkit's own `sft`, then
    # cached.
    task = resolve(loaded.data.train)
    seconds = time.monotonic() - start
    place = task.model_folder.parent
    console.print(f"base model and pairs: {place} ({seconds:.0f} s)", soft_wrap=True)

    # 2. The same as `alignkit train dpo` on the command line.
    start = time.monotonic()
    run_recipe(loaded)
    console.print(f"trained in {time.monotonic() - start:.0f} s")

    # 3. The aligned model is an ordinary transformers model. Same noise for both: what differs is
    # the training.
    aligned = Path(loaded.output_dir) / "model"
    show_samples(console, world, task.model_folder, aligned)

    # 4. Probabilities of every review under both models, and the policy that the objective's
    # mathematics promises.
    completions = list(world.rewards)
    before = folder_logps(task.model_folder, world.prompts, completions)
    after = folder_logps(aligned, world.prompts, completions)
    rewards = outcome_rewards(list(world.rewards.values()), world.outside)
    optimum = objective.optimum(rewards, before)
    rows = [
        figures(policy, before, rewards, optimum=optimum, beta=objective.beta)
        for policy in (before, after, optimum)
    ]
    show_figures(console, rows)

    # 5. How much closer training came to that policy.
    fell = rows[0].kl_optimum / rows[1].kl_optimum
    console.print(
        f"KL to the closed-form optimum fell {fell:.0f} times; the model is in {aligned}",
        soft_wrap=True,
    )
    return rows[1]


def show_samples(console: Console, world: Reviews, base: Path, aligned: Path) -> None:
    """One review per prompt by each model, side by side."""
    prompts = world.prompts[:: max(1, len(world.prompts) // 8)]
    table = Table("prompt", "before", "after", title="samples")
    columns = []
    for folder in (base, aligned):
        models = OneModel(
            AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        )
        columns.append([texts[0] for texts in generate(models, prompts, max_new_tokens=world.cap)])
    for row in zip(prompts, *columns):
        table.add_row(*row)
    console.print(table)


def show_figures(console: Console, rows: list[Figures]) -> None:
    """The exact figures before and after, beside those of the optimum."""
    table = Table("exact figure, mean over prompts", "before", "after", "optimum", title="results")
    wanted = {
        "expected reward": "reward",
        "KL to the base, nats": "kl",
        "KL to the closed-form optimum, nats": "kl_optimum",
        "share of the best objective": "share",
        "probability outside the grammar": "outside",
    }
    for title, name in wanted.items():
        table.add_row(title, *(f"{getattr(row, name):.4f}" for row in rows))
    console.print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
