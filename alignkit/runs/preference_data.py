"""What the training of reward and preference models is fed with: pairs or rankings, and figures on
held-out ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from alignkit.batches import Bundle
from alignkit.config.recipe import Recipe
from alignkit.data.load import fingerprint, load_bundles
from alignkit.data.report import Report
from alignkit.errors import ConfigError
from alignkit.metrics.completions import preference_figures
from alignkit.objectives.base import Objective
from alignkit.policies.scorer import Scorer, TrainedScorer, joined, separator_of
from alignkit.runs.job_data import Feed
from alignkit.sources.dataset import DatasetSource
from alignkit.tasks import Task
from alignkit.training.reduction import Metrics


def preference_feed(
    recipe: Recipe,
    objective: Objective,
    task: Task | None,
    scorer: TrainedScorer,
    accelerator: Accelerator,
    safe: bool,
) -> Feed:
    """Bundles for an objective that learns from outputs. Plain texts get no end token unless
    `data.append_eos` says so: the model is read at the last token of the text itself, as reward
    models are when they score.
    """
    rank = accelerator.process_index
    world = accelerator.num_processes
    if not hasattr(objective, "log_odds"):
        raise ConfigError(
            "objective: reward and preference models cannot be summed in a weighted list"
        )
    bundles, report = _load(recipe, objective, task, scorer, "train")
    identity = {"rows": fingerprint(bundles)}
    notes = report.lines()

    def samples(step: int) -> list[dict[str, Any]]:
        return []

    source = DatasetSource(
        bundles,
        objective.plan,
        recipe.train.batch_size,
        seed=recipe.train.seed,
        rank=rank,
        world=world,
    )
    if not recipe.data.eval:
        return Feed(source, len(bundles), report.format, identity, notes, samples)
    every, other = _load(recipe, objective, task, scorer, "eval")
    held_out = every[rank::world]
    notes = [*notes, *other.lines()]
    measure = Figures(objective, scorer, held_out, int(recipe.train.micro_batch_tokens))
    return Feed(source, len(bundles), report.format, identity, notes, samples, held_out, measure)


def _load(
    recipe: Recipe, objective: Objective, task: Task | None, scorer: TrainedScorer, split: str
) -> tuple[list[Bundle], Report]:
    plan = objective.plan
    config = recipe.data
    source: Any = getattr(config, split)
    if source.startswith("task:"):
        assert task is not None
        source = task.rows(plan.data, split)
    if config.append_eos == "auto":
        config = config.model_copy(update={"append_eos": False})
    bundles, report = load_bundles(config, plan.data, scorer.tokenizer, source=source)
    if plan.joined:
        bundles = [joined(bundle, separator_of(scorer.tokenizer)) for bundle in bundles]
    return bundles, report


@dataclass
class Figures:
    """Accuracy, calibration and position bias on held-out rows, over all processes; called at
    evaluations.
    """

    objective: Any
    scorer: Scorer
    bundles: Sequence[Bundle]  # this process's share
    budget: int

    @torch.no_grad()
    def __call__(self) -> Metrics:
        """Every pair of a ranking counts as one pair."""
        odds: list[float] = []
        bias: list[float] = []
        plan = self.objective.plan
        for chunk in self.scorer.micro_batches(self.bundles, self.budget):
            bundles = [self.bundles[i] for i in chunk]
            outputs = self.scorer.scores(bundles).values.cpu()
            for mine in outputs.split([len(b.completions) for b in bundles]):
                better, worse = zip(*combinations(range(len(mine)), 2))
                odds += self.objective.log_odds(mine[list(better)], mine[list(worse)]).tolist()
                bias += [float(mine.sigmoid().sum() - 1)] if plan.joined else []
        every_odds = gather_object(odds)
        every_bias = gather_object(bias)
        return preference_figures(
            torch.tensor(every_odds, dtype=torch.float64).sigmoid(),
            every_bias if plan.joined else None,
        )
