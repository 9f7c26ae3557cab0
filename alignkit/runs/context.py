"""What every step of building a run needs to know, in one object."""

import math
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from alignkit.batches import Plan
from alignkit.config.recipe import Recipe
from alignkit.config.row_sources import RowSource, TrainSource
from alignkit.data.read import HeldOut, Source
from alignkit.errors import ConfigError
from alignkit.objectives.base import Objective
from alignkit.policies.pair import PolicyPair
from alignkit.runs.live import PREFIX, LiveTask
from alignkit.tasks import Task


@dataclass(frozen=True)
class RunContext:
    """A recipe with everything that was loaded for it."""

    recipe: Recipe
    objective: Objective
    task: Task | None  # the embedded task that the recipe names, if it names one
    pair: PolicyPair
    accelerator: Accelerator
    safe: bool = False  # whether code that the recipe names is refused
    stream: str | None = None  # the name of the stream that this is about, where there are several

    @property
    def plan(self) -> Plan:
        """What the objective asks of the loop."""
        return self.objective.plan

    @property
    def rank(self) -> int:
        """The number of this process."""
        return self.accelerator.process_index

    @property
    def processes(self) -> int:
        """How many processes train together."""
        return self.accelerator.num_processes

    def steps(self, rows: int) -> int:
        """Optimiser steps of the run, where an epoch has `rows` rows or prompts."""
        train = self.recipe.train
        if train.epochs is None:
            return train.steps or 0
        return math.ceil(train.epochs * rows / train.batch_size) * self.plan.epochs

    def training_rows(self, source: TrainSource) -> Source:
        """What a source of `data.train` names."""
        rows = self._named(source.source, "train")
        return source if rows is None else rows[: source.max_rows]

    def held_out_rows(self, source: RowSource) -> Source:
        """What a source of `data.eval` names."""
        rows = self._named(source.source, "eval")
        return HeldOut(source) if rows is None else rows[: source.max_rows]

    def _named(self, name: str, split: str) -> list[dict[str, Any]] | None:
        """The rows of `task:NAME`, and those of `python:...`, which the caller gave as objects; None
        for what is read from a file or a hub.
        """
        if name.startswith(PREFIX):
            rows = self.task.live_rows(name) if isinstance(self.task, LiveTask) else None
            if rows is None:
                raise ConfigError(
                    f"data.{split}: {name} was given to alignkit.train as an object; start the run "
                    "there again, or name a file"
                )
            return rows
        if not name.startswith("task:"):
            return None

        assert self.task is not None  # resolved from the very same field
        return self.task.rows(self.plan.data, split)
