"""Small self-contained worlds: a base model, rows, a reward. `resolve` finds one by name; importing
this imports no torch.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from alignkit.config.validation import nearest
from alignkit.errors import ConfigError

# name -> the module whose `task(name)` makes it
TASKS: dict[str, str] = {
    "reviews": "alignkit.tasks.reviews",
    "reviews_small": "alignkit.tasks.reviews",
    "arithmetic": "alignkit.tasks.arithmetic",
    "arithmetic_small": "alignkit.tasks.arithmetic",
    "cyclic": "alignkit.tasks.cyclic",
    "cyclic_small": "alignkit.tasks.cyclic",
}
DEFAULT_TASK = "reviews"  # the task of `model: task` where the data name none
# objective's data family -> the rows it learns from
FILES = {
    "pair": "pairs",
    "ranked": "pairs",
    "labelled": "pairs",
    "sequence": "demonstrations",
    "rollout": "prompts",
    "game": "prompts",
}


@dataclass(frozen=True)
class Task:
    """What a world hands down to a run."""

    name: str
    model_folder: Path  # loads with from_pretrained, tokenizer included
    rows_folder: Path
    # reward(prompts, completions, **columns) -> one number per completion
    reward: Callable[..., list[float]]
    # judge(prompts, first, second) -> Verdict, where the task is a game
    judge: Callable[..., Any] | None = None

    def rows(self, family: str, split: str = "train") -> list[dict[str, Any]]:
        """The rows of `split` (train, eval) that an objective of `family` learns from."""
        file = self.rows_folder / f"{FILES[family]}_{split}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        if family != "labelled":
            return rows
        labels = (("chosen", True), ("rejected", False))
        return [
            {"prompt": row["prompt"], "completion": row[c], "label": label}
            for row in rows
            for c, label in labels
        ]


def resolve(name: str) -> Task:
    """The task `name` (with or without `task:` in front), made on first use and cached.

    Errors: ConfigError for an unknown name, ResourceError when it cannot be made or written.
    """
    name = name.removeprefix("task:")
    if name not in TASKS:
        raise ConfigError(
            f"there is no task `{name}`.{nearest(name, TASKS)} Tasks: {', '.join(TASKS)}"
        )
    return import_module(TASKS[name]).task(name)
