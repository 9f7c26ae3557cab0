"""What rewards and judges make of a rollout: scores and preferences as rows of the bundles, and the
figures that describe them.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from alignkit.batches import Bundle, Plan
from alignkit.credit import constant_groups
from alignkit.errors import DataError, NumericsError
from alignkit.judges.rows import INVALID, Compare, judged
from alignkit.rewards.call import RewardCall, call_reward
from alignkit.rollout.episodes import Episode
from alignkit.rollout.protocol import Sample
from alignkit.sources.episodes import bundles_of, message_scores, warn_of_failures

log = logging.getLogger("alignkit")

Decode = Callable[[Any, Tensor], Any]  # (prompt, token ids) -> what rewards and judges read
Samples = Sequence[Sequence[Sample]]  # one list for each prompt
Answers = Sequence[Sequence[Sample]] | Sequence[Sequence[Episode]]

# After so many rollouts in a row in which no prompt's completions differ in score, the user is
# warned.
FLAT_LIMIT = 5


@dataclass
class Scoring:
    """Asks the reward or the judge that the plan's `feedback` calls for.

    `metrics` holds what the reward or the judge reports about itself, such as each function's own
    mean and the number of failures.
    """

    plan: Plan
    decode: Decode
    reward: RewardCall | None = None
    judge: Compare | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def score(
        self,
        prompts: Sequence[Any],
        bundles: Sequence[Bundle],
        answers: Samples,
        opponents: Samples,
        step: int,
    ) -> list[Bundle | None]:
        """The bundles with the rows that the feedback adds to them.

        `answers` are the completions of `bundles`; a judge compares them with `opponents` where the
        plan draws any. `step` is handed to rewards as the trainer's step. None stands for a bundle
        that cannot be used: no completion has a score, or a verdict is invalid.
        """
        if self.plan.feedback == "none":
            return list(bundles)

        texts = self._texts(prompts, answers)
        if self.plan.feedback == "reward":
            return self._rewarded(prompts, bundles, answers, texts, step)
        return self._judged(prompts, bundles, texts, self._texts(prompts, opponents))

    def score_episodes(
        self,
        prompts: Sequence[Any],
        rows: Sequence[Sequence[Episode]],
        groups: Sequence[int],
        step: int,
    ) -> list[list[Bundle]]:
        """The bundles of each prompt's episodes, with the score of each: what its environment gave
        plus, where there is a reward, what that makes of its messages. Episodes that failed are set
        aside. `groups` are the numbers of the prompts in the rollout.
        """
        warn_of_failures(prompts, rows)
        played = [[episode for episode in row if episode.failed is None] for row in rows]
        given: list[list[float | None]] = [[0.0 for _ in row] for row in played]
        if self.reward is not None:
            state = SimpleNamespace(global_step=step)
            given = message_scores(self.reward, prompts, played, trainer_state=state)
            self.metrics |= getattr(self.reward, "metrics", {})

        return [
            bundles_of(prompt, *_with_a_score(row, scores), group)
            for prompt, row, scores, group in zip(prompts, played, given, groups)
        ]

    def _texts(self, prompts: Sequence[Any], samples: Samples) -> list[list[Any]]:
        return [
            [self.decode(prompt, sample.ids) for sample in row]
            for prompt, row in zip(prompts, samples)
        ]

    def _rewarded(
        self,
        prompts: Sequence[Any],
        bundles: Sequence[Bundle],
        answers: Samples,
        texts: list[list[Any]],
        step: int,
    ) -> list[Bundle | None]:
        if self.reward is None:
            raise DataError("this objective needs a reward; set `rewards` in the recipe")

        scores = call_reward(
            self.reward,
            prompts,
            texts,
            [[sample.ids.tolist() for sample in row] for row in answers],
            trainer_state=SimpleNamespace(global_step=step),
        )
        self.metrics |= getattr(self.reward, "metrics", {})
        by_token = getattr(self.reward, "token_rewards", None)
        if by_token is not None:
            bundles = _with_token_rewards(bundles, by_token)
        return [_with_scores(bundle, row) for bundle, row in zip(bundles, scores)]

    def _judged(
        self,
        prompts: Sequence[Any],
        bundles: Sequence[Bundle],
        texts: list[list[Any]],
        opponents: list[list[Any]],
    ) -> list[Bundle | None]:
        if self.judge is None:
            raise DataError("this objective needs a judge; set `judge` in the recipe")

        verdicts = judged(
            self.judge,
            [prompt.text for prompt in prompts],
            texts,
            opponents,
            table=self.plan.feedback == "table",
        )
        self.metrics |= getattr(self.judge, "metrics", {})
        return [
            None if rows is None else replace(bundle, rows={**bundle.rows, **rows})
            for bundle, rows in zip(bundles, verdicts)
        ]


def _with_token_rewards(
    bundles: Sequence[Bundle], by_token: Sequence[Sequence[float]]
) -> list[Bundle]:
    """The bundles with the rewards of their completions' tokens."""
    rows = iter(torch.tensor(numbers, dtype=torch.float64) for numbers in by_token)
    return [
        replace(b, tokens={**b.tokens, "reward": [next(rows) for _ in b.completions]})
        for b in bundles
    ]


def _with_scores(bundle: Bundle, scores: Sequence[float | None]) -> Bundle | None:
    """The completions that have a score, with it in row "score"; None where none has.

    A score of None says that the reward does not apply to the completion.
    """
    indices = [i for i, score in enumerate(scores) if score is not None]
    if not indices:
        return None
    return replace(
        bundle,
        completions=[bundle.completions[i] for i in indices],
        masks=[bundle.masks[i] for i in indices],
        tokens={name: [values[i] for i in indices] for name, values in bundle.tokens.items()},
        rows={
            **{name: values[indices] for name, values in bundle.rows.items()},
            "score": torch.tensor([scores[i] for i in indices], dtype=torch.float64),
        },
    )


def rollout_metrics(
    plan: Plan,
    samples: Answers,
    bundles: Sequence[Sequence[Bundle]],
    accelerator: Accelerator,
    further: Mapping[str, list[float]] | None = None,
) -> dict[str, float]:
    """Means that describe a rollout, over all ranks. `bundles` has none for a prompt that was
    dropped; `further` are columns whose means belong to them, of the same names on all ranks.

    DataError or NumericsError where no bundle is left on any rank.
    """
    every_score = [scores_of(row) for row in bundles]
    scores = [row for row in every_score if row is not None]
    values: dict[str, list[float]] = {
        "completions/mean_length": [sample.own_tokens for row in samples for sample in row],
        "completions/clipped_ratio": [not sample.ended for row in samples for sample in row],
        "rollout/dropped": [not row for row in bundles],
        **(further or {}),
    }
    if plan.feedback == "reward":
        values["reward"] = [value for row in scores for value in row.tolist()]
        values["reward_std"] = [float(row.std()) if len(row) > 1 else 0.0 for row in scores]
        values["frac_reward_zero_std"] = _agree(scores)
        # Completions that lost all others to compare them with: their advantage is 0.
        values["rollout/groups_of_one"] = [
            len(left) == 1 < len(row) for row, left in zip(samples, every_score) if left is not None
        ]
    elif plan.feedback != "none":
        values["judge/invalid"] = values["rollout/dropped"]

    sums_and_counts = torch.tensor(
        [[sum(column), len(column)] for column in values.values()],
        dtype=torch.float64,
        device=accelerator.device,
    )
    totals = dict(zip(values, accelerator.reduce(sums_and_counts).tolist()))

    dropped, asked = totals["rollout/dropped"]
    if dropped == asked:
        if plan.feedback == "reward":
            raise DataError(
                "no completion of this step has a score; check the reward, or the environment"
            )
        raise NumericsError(INVALID)
    return {name: total / max(count, 1) for name, (total, count) in totals.items()}


def mixed_versions(samples: Answers, accelerator: Accelerator) -> dict[str, float]:
    """The share of completions, over all ranks, whose tokens were drawn with more than one version
    of the weights. Their log-probs are those of each token's own version, so importance weights
    account for them.
    """
    flags = [sample.mixed for row in samples for sample in row]
    own = torch.tensor([sum(flags), len(flags)], dtype=torch.float64, device=accelerator.device)
    mixed, total = accelerator.reduce(own).tolist()
    return {"sampling/mixed_versions": mixed / max(total, 1)}


def scores_of(bundles: Sequence[Bundle]) -> Tensor | None:
    """The scores of a prompt's completions [K], each once; None where nothing scores them."""
    if not bundles or not all("score" in bundle.rows for bundle in bundles):
        return None
    scores = torch.cat([bundle.rows["score"] for bundle in bundles])
    if "segment" not in bundles[0].rows:
        return scores
    return scores[torch.cat([bundle.rows["segment"] for bundle in bundles]) == 0]


def _with_a_score(
    episodes: Sequence[Episode], given: Sequence[float | None]
) -> tuple[list[Episode], list[float]]:
    """The episodes to which the reward applies, and their scores."""
    scored = [
        (episode, episode.reward + score)
        for episode, score in zip(episodes, given, strict=True)
        if score is not None
    ]
    return [episode for episode, _ in scored], [score for _, score in scored]


def _agree(scores: Sequence[Tensor]) -> list[float]:
    """1 for each prompt whose completions have one and the same score, else 0; `scores` are [K]."""
    if not scores:
        return []
    sizes = torch.tensor([len(row) for row in scores])
    alike = constant_groups(
        torch.cat(list(scores)), torch.arange(len(sizes)).repeat_interleave(sizes)
    )
    return [float(row.all()) for row in alike.split(sizes.tolist())]


class FlatScores:
    """Counts rollouts in a row in which every prompt's completions scored the same.

    A group baseline then leaves nothing to learn from, and the loss does not show it.
    """

    def __init__(self) -> None:
        self.in_a_row = 0

    def watch(self, metrics: Mapping[str, float], accelerator: Accelerator) -> None:
        """Take note of a rollout's metrics, and warn at every FLAT_LIMIT-th flat one in a row."""
        flat = metrics.get("frac_reward_zero_std") == 1
        self.in_a_row = self.in_a_row + 1 if flat else 0

        if flat and self.in_a_row % FLAT_LIMIT == 0 and accelerator.is_main_process:
            log.warning(
                "in the last %d rollouts every prompt's completions had one and the same score (%.4g on average): scores say "
                "nothing about which completion is better. Check the reward, take other prompts, or raise rollout.completions",
                self.in_a_row,
                metrics["reward"],
            )
