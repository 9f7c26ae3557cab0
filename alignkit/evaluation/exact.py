"""Exact figures on tasks whose outcomes can be listed: no samples, no estimates.

The outcomes of a prompt are the completions of the task's grammar and, last, everything else as
one (alignkit.tasks.exact). Axes: P prompts, n + 1 outcomes.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from alignkit.metrics.baselines import Baseline, exact_best_of_n
from alignkit.metrics.frontier import OptimalFrontier
from alignkit.metrics.intervals import Array
from alignkit.policies.pair import PolicyPair
from alignkit.tasks import TASKS
from alignkit.tasks.cyclic import Cyclic
from alignkit.tasks.exact import folder_logps, kl, outcome_logps, outcome_rewards
from alignkit.tasks.reviews import Reviews


@dataclass(frozen=True)
class ExactFigures:
    """Of one model, per prompt [P]."""

    score: Array  # E[reward]
    kl: Array  # KL(policy || reference)
    forward_kl: Array  # KL(reference || policy)
    outside: Array  # probability of everything outside the grammar


class Listed:
    """A listed task with its reference model."""

    def __init__(self, reviews: Reviews, reference: Path | str):
        self.prompts = reviews.prompts
        self.completions = list(reviews.rewards)
        self.rewards = outcome_rewards(list(reviews.rewards.values()), reviews.outside)  # [n + 1]
        self.reference = folder_logps(reference, self.prompts, self.completions)  # [P, n + 1]

    def figures(self, model: Path | str | PolicyPair) -> ExactFigures:
        """Exact figures of the model in a folder (a run's `model`), or
        of a pair's policy (adapters too).
        """
        if isinstance(model, PolicyPair):
            policy = outcome_logps(model, self.prompts, self.completions)
        else:
            policy = folder_logps(model, self.prompts, self.completions)
        return ExactFigures(
            (policy.exp() * self.rewards).sum(-1).numpy(),
            kl(policy, self.reference).numpy(),
            kl(self.reference, policy).numpy(),
            policy[:, -1].exp().numpy(),
        )

    @cached_property
    def optimal(self) -> OptimalFrontier:
        """The closed-form optimal frontier."""
        return OptimalFrontier(np.asarray(self.reference), np.asarray(self.rewards))

    @cached_property
    def base(self) -> Array:
        """The reference's expected reward per prompt [P]: where frontiers start."""
        return (self.reference.exp() * self.rewards).sum(-1).numpy()

    def best_of_n(self, n: int) -> Baseline:
        """The exact law of best-of-n."""
        return exact_best_of_n(np.asarray(self.reference), np.asarray(self.rewards), n)


def listed_reviews(task: str) -> Reviews | None:
    """The reviews behind `task:NAME`, whose outcomes can be listed; None for any other task."""
    definition = TASKS.get(task.removeprefix("task:"))
    if isinstance(definition, Cyclic):
        definition = definition.base
    return definition if isinstance(definition, Reviews) else None
