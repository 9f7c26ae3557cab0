"""How the rest of alignkit calls a reward: several completions
of each prompt in, one score for each out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from alignkit.errors import DataError, NumericsError
from alignkit.rewards.checks import LARGEST, finite_or_inf

Score = float | None  # None: the reward does not apply to this completion
RewardCall = Callable[..., Sequence[Score]]  # TRL's signature, see `alignkit.rewards.Reward`


class ScoredPrompt(Protocol):
    """What is needed of a prompt; `alignkit.data.load.Prompt` has it."""

    @property
    def text(self) -> Any:
        """The prompt as it stood in the data: a string, or the messages of a chat."""
        ...

    @property
    def columns(self) -> Mapping[str, Any]:
        """The other columns of its row, which become keyword arguments of the reward."""
        ...


def call_reward(
    reward: RewardCall,
    prompts: Sequence[ScoredPrompt],
    completions: Sequence[Sequence[Any]],
    completion_ids: Sequence[Sequence[list[int]]],
    *,
    trainer_state: Any = None,
) -> list[list[Score]]:
    """The score of every completion, prompt by prompt, from one call of `reward`.

    prompts         P prompts
    completions     for each prompt its completions: strings, or message lists where the prompt is
                    a chat (`alignkit.rollout.text.as_reply`)
    completion_ids  the token ids of each completion
    trainer_state   handed on unless it is None; TRL's rewards read its `global_step`

    A column that only some of the prompts have is None for the others. Without a completion the
    reward is not called. DataError where the scores are not one for each completion, NumericsError
    where one is not finite.
    """
    owners = [prompt for prompt, row in zip(prompts, completions, strict=True) for _ in row]
    if not owners:
        return [[] for _ in prompts]

    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
    columns = {name: [owner.columns.get(name) for owner in owners] for name in names}
    context = {} if trainer_state is None else {"trainer_state": trainer_state}

    scores = reward(
        [owner.text for owner in owners],
        [completion for row in completions for completion in row],
        completion_ids=[ids for row in completion_ids for ids in row],
        **context,
        **columns,
    )
    if len(scores) != len(owners):
        raise DataError(
            f"the reward returned {len(scores)} scores for {len(owners)} completions; it should "
            "return one for each"
        )

    values = iter(_finite(reward, scores))
    return [[next(values) for _ in row] for row in completions]


def _finite(reward: RewardCall, scores: Sequence[Any]) -> list[Score]:
    """The scores as Python's floats, which are float64. NumericsError for nan and inf."""
    values = [None if score is None else finite_or_inf(score) for score in scores]
    for row, value in enumerate(values):
        if value is not None and not math.isfinite(value):
            name = getattr(reward, "__name__", type(reward).__name__)
            raise NumericsError(
                f"reward {name} gives {value} for row {row} of {len(values)} completions; scores "
                f"should be finite and within {LARGEST:g}"
            )
    return values
