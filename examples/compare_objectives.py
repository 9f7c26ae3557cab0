"""What `alignkit compare` does, in Python: three objectives on film reviews, reward against KL,
with the optimum known.

    python examples/compare_objectives.py

It takes a few minutes; the report is runs/compare_objectives/report.html. Run it again after an
interruption: finished runs are not repeated.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

from alignkit.comparison.compare import compare
from alignkit.config.recipe import load_recipe

# The online objective takes fewer, larger steps and averages its weights.
ONLINE = {
    "steps": 150,
    "batch_size": 32,
    "learning_rate": 2.0e-3,
    "adam_betas": [0.9, 0.99],
    "ema_decay": 0.97,
}
RECIPE = {
    "model": {"name_or_path": "task"},
    "data": {"train": "task:reviews"},
    "train": {
        "steps": 400,
        "batch_size": 64,
        "learning_rate": 5.0e-4,
        "warmup_steps": 50,
        "log_samples_every": 0,
    },
    "rollout": {"completions": 16, "max_new_tokens": 16},
    "compare": {
        # Label -> fields of the objective; every value of a list is a run.
        "grid": {
            "dpo": {"beta": [0.5, 1.0, 2.0]},
            "hdpo": {"alpha": 0.9, "beta": [0.5, 1.0, 2.0]},
            "rpg": {"clip_low": None, "clip_high": None, "beta": [0.25, 0.5, 1.0]},
        },
        # What differs for one objective: its own steps and optimiser.
        "overrides": {"rpg": {"train": ONLINE}},
        "seeds": [0],
        "samples": 16,
    },
}


def main(folder: str | Path = "runs/compare_objectives", *overrides: str) -> dict[str, Any]:
    """Run the grid and print how much of the best possible gain every run reached at its KL."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The recipe stands beside the folder, which belongs to the comparison alone.
    file = folder.with_name(f"{folder.name}.yaml")
    file.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    results = compare(load_recipe(file, [f"output_dir={folder}", *overrides]))

    for curve in results["curves"]:
        for point in curve["points"]:
            kl = point["kl"]["value"]
            score = point["score"]["value"]
            share = "-" if point["efficiency"] is None else f"{point['efficiency']:.3f}"
            print(
                f"{curve['label']:6} {point['setting']:10} KL {kl:.3f}  "
                f"expected reward {score:+.3f}  efficiency {share}"
            )

    # A verdict is worded from its interval: "A over B at matched KL 1.2: +0.03 [0.01, 0.05]", or
    # that no difference is shown, or that the runs of the two span no common KL.
    for pair in results["verdicts"]["pairs"]:
        print(pair["words"])
    print(f"the report: {folder / 'report.html'}")
    return results


if __name__ == "__main__":
    main(*sys.argv[1:])
