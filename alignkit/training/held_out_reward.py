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
from alignkit.rewards.call import RewardCall, call_reward
from alignkit.rollout.protocol import Sampler
from alignkit.training.reduction import Metrics


def _at_once() -> None:
    """Nobody has to be waited for."""


@dataclass(frozen=True)
class HeldOut:
    """Answers every prompt once, always with the same noise, and asks the reward. Prompts are
    shared out over the ranks.
    """

    prompts: Sequence[Any]  # alignkit.data Prompt: ids, text (or messages), columns
    sampler: Sampler
    decode: Callable[[Any, Tensor], Any]  # (prompt, ids) -> what the reward reads
    reward: RewardCall
    accelerator: Accelerator
    # Returns when nobody else draws from the sampler's engine.
    wait: Callable[[], None] = _at_once

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
        drawn = self.sampler.sample(
            [p.ids for p in prompts], Draw(1), step=0, prompt_ids=[i for i, _ in numbered]
        )
        samples = [rows[0] for rows in drawn]

        scores = call_reward(
            self.reward,
            prompts,
            [[self.decode(p, s.ids)] for p, s in zip(prompts, samples)],
            [[s.ids.tolist()] for s in samples],
        )

        scored = [score for (score,) in scores if score is not None]
        return torch.tensor(
            [sum(scored), len(scored), sum(len(s.ids) for s in samples), len(samples)],
            dtype=torch.float64,
        )
