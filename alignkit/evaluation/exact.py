"""Exact figures on worlds whose outcomes can be listed: no samples, no estimates.

The outcomes of a prompt are the completions of the world's grammar and, last, everything else as
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
from alignkit.tasks.cyclic import BASES
from alignkit.tasks.exact import folder_logps, kl, outcome_logps, outcome_rewards
from alignkit.tasks.reviews import WORLDS, World


@dataclass(frozen=True)
class ExactFigures:
    """Of one model, per prompt [P]."""

    score: Array  # E[reward]
    kl: Array  # KL(policy || reference)
    forward_kl: Array  # KL(reference || policy)
    outside: Array  # probability of everything outside the grammar


class Listed:
    """A world with its reference model."""

    def __init__(self, world: World, reference: Path | str):
        self.world = world
        self.prompts = world.prompts
        self.completions = list(world.rewards)
        self.rewards = outcome_rewards(list(world.rewards.values()), world.outside)  # [n + 1]
        self.reference = folder_logps(reference, self.prompts, self.completions)  # [P, n + 1]

    def figures(self, model: Path | str | PolicyPair) -> ExactFigures:
        """Exact figures of the model in a folder (a run's `model`), or of a pair's policy (adapters
        too).
        """
        score = outcome_logps if isinstance(model, PolicyPair) else folder_logps
        policy = score(model, self.prompts, self.completions)
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


def listed_world(task: str) -> World | None:
    """The world of `task:NAME` if its outcomes can be listed, else None."""
    name = task.removeprefix("task:")
    return WORLDS.get(BASES.get(name, name))
