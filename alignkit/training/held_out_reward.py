"""Held-out prompts of a run whose data are sampled: how well the policy answers them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from alignkit.batches import Draw
from alignkit.distributed.errors import raise_on_all_ranks
from alignkit.errors import DataError
from alignkit.rewards.call import call_reward
from alignkit.rollout.protocol import Sampler
from alignkit.rollout.turns import TurnSampler
from alignkit.sources.scoring import Scoring, scores_of
from alignkit.training.reduction import Metrics


def at_once() -> None:
    """Nobody has to be waited for."""


@dataclass(frozen=True)
class HeldOut:
    """Answers every prompt once, always with the same noise, and asks the reward. Prompts are
    shared out over the ranks.
    """

    prompts: Sequence[Any]  # alignkit.data Prompt: ids, text (or messages), columns
    sampler: Sampler
    scoring: Scoring
    accelerator: Accelerator
    # Returns when nobody else draws from the sampler's engine.
    wait: Callable[[], None] = at_once
    turns: TurnSampler | None = None  # where an answer is an episode

    def __call__(self) -> Metrics:
        """`reward` and `completions/mean_length` over all prompts and ranks. DataError when no
        prompt has a reward.
        """
        with raise_on_all_ranks(self.accelerator):
            self.wait()
            self.sampler.sync()

        with raise_on_all_ranks(self.accelerator):
            own = self._sums(
                list(enumerate(self.prompts))[
                    self.accelerator.process_index :: self.accelerator.num_processes
                ]
            )
            self.sampler.rest()

        total, count, tokens, rows = self.accelerator.reduce(
            own.to(self.accelerator.device)
        ).tolist()
        if not count:
            raise DataError("no held-out completion has a score; check the reward and data.eval")
        return {"reward": total / count, "completions/mean_length": tokens / rows}

    def _sums(self, numbered: Sequence[tuple[int, Any]]) -> Tensor:
        """[4]: sum and number of the scores of these prompts' answers,
        tokens and number of the answers.
        """
        prompts = [prompt for _, prompt in numbered]
        if self.turns is not None:
            return self._sums_of_episodes(prompts, [i for i, _ in numbered])
        assert self.scoring.reward is not None
        drawn = self.sampler.sample(
            [p.ids for p in prompts], Draw(1), step=0, prompt_ids=[i for i, _ in numbered]
        )
        samples = [rows[0] for rows in drawn]

        scores = call_reward(
            self.scoring.reward,
            prompts,
            [[self.scoring.decode(p, s.ids)] for p, s in zip(prompts, samples)],
            [[s.ids.tolist()] for s in samples],
        )

        scored = [score for (score,) in scores if score is not None]
        return torch.tensor(
            [sum(scored), len(scored), sum(len(s.ids) for s in samples), len(samples)],
            dtype=torch.float64,
        )

    def _sums_of_episodes(self, prompts: Sequence[Any], numbers: Sequence[int]) -> Tensor:
        """The same of one episode for each prompt; tokens are the policy's own."""
        assert self.turns is not None
        rows = self.turns.episodes(prompts, Draw(1), step=0, prompt_ids=numbers)
        bundles = self.scoring.score_episodes(prompts, rows, numbers, 0)
        scores = [score for row in bundles if (score := scores_of(row)) is not None]
        tokens = [episode.own_tokens for row in rows for episode in row if not episode.failed]
        sums = [sum(float(score.sum()) for score in scores), len(scores), sum(tokens), len(tokens)]
        return torch.tensor(sums, dtype=torch.float64)
