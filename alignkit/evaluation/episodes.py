"""Episodes in the place of completions: what `alignkit eval` and `alignkit compare` measure where a
recipe, or its task, has an environment or tools.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from alignkit.batches import Bundle, Draw
from alignkit.config.data import DataConfig
from alignkit.data.prompts import Prompt
from alignkit.evaluation.measurements import BoolArray
from alignkit.metrics.intervals import Array
from alignkit.policies.module import context_length
from alignkit.policies.pair import PolicyPair
from alignkit.rewards.call import RewardCall
from alignkit.rollout.environment_pool import Environments
from alignkit.rollout.episodes import Episode
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.play import renderer_for, told
from alignkit.rollout.turns import TurnSampler
from alignkit.sources.episodes import message_scores, warn_of_failures

Rows = Sequence[Sequence[Episode]]  # P x K


@dataclass(frozen=True)
class World:
    """What every model acts in."""

    environments: Environments
    turns: int  # most turns of an episode
    data: DataConfig  # how messages become tokens

    def play(
        self, pair: PolicyPair, sampler: HFSampler, prompts: Sequence[Prompt], draw: Draw
    ) -> list[list[Episode]]:
        """`draw.n` episodes for each prompt, under the sampler's cap and seed. Those that fail are
        reported; they have no score and no tokens.
        """
        with pair.model("policy") as model:
            context = context_length(model)
        player = TurnSampler(
            sampler,
            self.environments,
            renderer_for(pair, self.data, self.environments, prompts),
            turns=self.turns,
            max_new_tokens=sampler.max_new_tokens,
            context=context,
            seed=sampler.seed,
        )
        rows = player.episodes(prompts, draw, step=0, prompt_ids=range(len(prompts)))
        warn_of_failures(prompts, rows)
        return rows


def segments_of(rows: Rows) -> tuple[list[Bundle], list[int]]:
    """Every segment of every episode as a bundle of its own, and the number of its episode."""
    every = [episode for row in rows for episode in row]
    segments = [(number, part) for number, each in enumerate(every) for part in each.segments]
    bundles = [Bundle(part.prompt, [part.ids], [part.mask]) for _, part in segments]
    return bundles, [number for number, _ in segments]


def own_tokens(rows: Rows) -> list[list[list[int]]]:
    """The tokens that the policy has drawn, P x K."""
    nothing = [torch.zeros(0, dtype=torch.int64)]
    return [
        [torch.cat([*nothing, *(s.ids[s.mask] for s in e.segments)]).tolist() for e in row]
        for row in rows
    ]


def turn_by_turn(rows: Rows) -> list[list[str]]:
    """Every episode as a person reads it, P x K texts of one line per turn."""
    return [["\n".join(told(episode)) for episode in row] for row in rows]


def failures(rows: Rows) -> BoolArray:
    """Which episodes failed [P, K]."""
    return np.array([[episode.failed is not None for episode in row] for row in rows])


def counts(rows: Rows) -> dict[str, Array]:
    """Numbers of each episode [P, K], under the names that `Measured` has for them; nan where one
    failed.
    """
    every = {
        "turns": [[e.turns for e in row] for row in rows],
        "read": [[e.tokens for e in row] for row in rows],
        "calls": [[e.calls for e in row] for row in rows],
        "failures": [[e.failures for e in row] for row in rows],
    }
    unknown = failures(rows)
    return {name: np.where(unknown, np.nan, values) for name, values in every.items()}


def scores(
    rows: Rows, prompts: Sequence[Prompt], reward: RewardCall | None, environments: Environments
) -> Array | None:
    """What the environment gave plus what `reward` makes of the messages [P, K]: nan where an episode
    failed or the reward does not apply. None where neither gives anything.
    """
    about = environments.about
    if reward is None and not (about.steps or about.rewards):
        return None
    total = np.array([[np.nan if e.failed else e.reward for e in row] for row in rows])
    if reward is None:
        return total

    played = [[episode for episode in row if episode.failed is None] for row in rows]
    given = message_scores(reward, prompts, played)
    for place, row in enumerate(given):
        known = [np.nan if score is None else score for score in row]
        total[place, ~np.isnan(total[place])] += known
    return total
