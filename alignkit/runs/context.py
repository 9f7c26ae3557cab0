"""What every step of building a run needs to know, in one object."""

from dataclasses import dataclass

from accelerate import Accelerator

from alignkit.batches import Plan
from alignkit.config.recipe import Recipe
from alignkit.data.read import Source, held_out
from alignkit.objectives.base import Objective
from alignkit.policies.pair import PolicyPair
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

    def rows(self, split: str) -> Source:
        """What `data.train` or `data.eval` (the split) names; `task:NAME` becomes the rows of that
        task, `python:...` those that the caller gave as objects.
        """
        data = self.recipe.data
        source = held_out(data) if split == "eval" else data.train
        assert source is not None  # nobody asks for the rows of an empty `data.eval`
        if not str(source).startswith(("task:", "python:")):
            return source

        assert self.task is not None  # resolved from the very same field
        return self.task.rows(self.plan.data, split)
