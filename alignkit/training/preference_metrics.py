"""How well a reward or preference model orders held-out completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from accelerate.utils import gather_object

from alignkit.batches import Bundle
from alignkit.metrics.completions import preference_figures
from alignkit.policies.scorer import Scorer
from alignkit.training.reduction import Metrics


@dataclass
class PreferenceMetrics:
    """Accuracy, calibration and position bias on held-out rows, over all processes.

    An instance is a job's `measure`: the loop calls it at every evaluation.
    """

    objective: Any  # an objective that learns from outputs and has `log_odds(better, worse)`
    scorer: Scorer
    bundles: Sequence[Bundle]  # this process's share; completions from best to worst
    micro_batch_tokens: int

    @torch.no_grad()
    def __call__(self) -> Metrics:
        """The metrics of `alignkit.metrics.completions.preference_figures`. Every pair of a ranking
        counts as one pair.
        """
        plan = self.objective.plan
        log_odds: list[float] = []
        position_bias: list[float] = []

        for chunk in self.scorer.micro_batches(self.bundles, self.micro_batch_tokens):
            bundles = [self.bundles[i] for i in chunk]
            outputs = self.scorer.scores(bundles).values.cpu()

            for ranked in outputs.split([len(b.completions) for b in bundles]):
                better, worse = zip(*combinations(range(len(ranked)), 2))
                log_odds += self.objective.log_odds(
                    ranked[list(better)], ranked[list(worse)]
                ).tolist()
                # Both orders of the same two completions: their probabilities should add up to 1.
                if plan.joined:
                    position_bias.append(float(ranked.sigmoid().sum() - 1))

        every_log_odds = gather_object(log_odds)
        every_bias = gather_object(position_bias)
        return preference_figures(
            torch.tensor(every_log_odds, dtype=torch.float64).sigmoid(),
            every_bias if plan.joined else None,
        )


@dataclass
class LabelMetrics:
    """Accuracy and calibration of labels on held-out rows, over all processes; a job's `measure`."""

    objective: Any  # an objective that learns log-odds of a completion's label
    scorer: Scorer
    bundles: Sequence[Bundle]  # this process's share
    micro_batch_tokens: int

    @torch.no_grad()
    def __call__(self) -> Metrics:
        """`preference_figures` of P(label), a tie counting half."""
        log_odds: list[float] = []
        for chunk in self.scorer.micro_batches(self.bundles, self.micro_batch_tokens):
            bundles = [self.bundles[i] for i in chunk]
            signs = torch.tensor([2.0 * bool(b.rows["label"][0]) - 1 for b in bundles])
            log_odds += (signs * self.scorer.scores(bundles).values[:, 0].cpu()).tolist()

        every = gather_object(log_odds)
        return preference_figures(torch.tensor(every, dtype=torch.float64).sigmoid())
