"""Small self-contained tasks: a base model, rows, a reward. `resolve` finds one by name.

A task is defined by a grammar or a rule (reviews, arithmetic, cyclic, shop). From that, build.py trains
the base model and writes the rows, in a process of its own (worker.py); cache.py keeps the files.
exact.py then computes what a model does on a task whose outcomes can be listed. Importing this
imports no torch.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alignkit.config.validation import nearest
from alignkit.errors import ConfigError
from alignkit.files import cached_folder
from alignkit.tasks.arithmetic import ARITHMETIC
from alignkit.tasks.cyclic import CYCLIC
from alignkit.tasks.definition import Definition
from alignkit.tasks.reviews import REVIEWS
from alignkit.tasks.shop import SHOP
from alignkit.tasks.worker import run_apart

TASKS: dict[str, Definition] = {**REVIEWS, **ARITHMETIC, **CYCLIC, **SHOP}
TEACHER_FORMAT = 1  # raise it when build.py makes other teachers of the same tasks
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
    """What a task hands down to a run."""

    name: str
    model_folder: Path  # loads with from_pretrained, tokenizer included
    rows_folder: Path
    # reward(prompts, completions, **columns) -> one number per completion
    reward: Callable[..., list[float]] | None
    # judge(prompts, first, second) -> Verdict, where the task is a game
    judge: Callable[..., Any] | None = None
    # a class of alignkit.rollout.environment.Environment, where episodes have several turns
    environment: Callable[[], Any] | None = None

    @property
    def teacher_folder(self) -> Path:
        """The task's teacher, made on first use: the base model, trained on the demonstrations.

        ResourceError when it cannot be made or written.
        """
        files = self.model_folder.parent
        make = partial(run_apart, self.name, teacher_of=files)
        return cached_folder(f"{files.name}-teacher{TEACHER_FORMAT}", make) / "model"

    def rows(self, family: str, split: str = "train") -> list[dict[str, Any]]:
        """The rows of `split` (train, eval) that an objective of `family` learns from."""
        file = self.rows_folder / f"{FILES[family]}_{split}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        if family != "labelled":
            return rows

        return [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows
            for side in ("chosen", "rejected")
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

    definition = TASKS[name]
    folder = cached_folder(definition.key, partial(run_apart, name))
    return Task(
        name,
        folder / "model",
        folder / "rows",
        definition.reward,
        definition.judge,
        getattr(definition, "environment", None),
    )
