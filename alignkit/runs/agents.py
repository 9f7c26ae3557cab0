"""The environment and the tools that a recipe names, ready to be played with."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from alignkit.batches import Draw
from alignkit.config.rollout import RolloutConfig
from alignkit.data.prompts import Prompt
from alignkit.errors import ConfigError
from alignkit.policies.module import context_length
from alignkit.rollout.engines import make_sampler
from alignkit.rollout.environment_pool import (
    Environments,
    LocalEnvironments,
    WorkerEnvironments,
)
from alignkit.rollout.episodes import Episode
from alignkit.rollout.play import renderer_for
from alignkit.rollout.protocol import Sampler
from alignkit.rollout.renderer import Renderer
from alignkit.rollout.turns import TurnSampler
from alignkit.runs.context import RunContext
from alignkit.tasks import Task

log = logging.getLogger("alignkit")


def environments_of(context: RunContext) -> Environments | None:
    """The worlds of the recipe, else of its task; None where completions are single answers.

    ConfigError where the code cannot be used, or gives no reward where nothing else does.
    """
    rollout = context.recipe.rollout
    task = context.task
    environments = open_environments(rollout, task)
    if environments is None:
        return None

    about = environments.about
    place = context.recipe.origin.at(("rollout", "environment"))
    if about.steps and rollout.tools:
        raise ConfigError(
            f"{place}: the environment has a method `step`, which answers every turn itself, so "
            "that `rollout.tools` would never be called; leave one of them out"
        )
    gives_reward = about.steps or about.rewards
    scored = context.recipe.rewards or (task is not None and task.reward is not None)
    if context.plan.feedback == "reward" and not gives_reward and not scored:
        raise ConfigError(
            f"{place}: the environment has neither `get_reward` nor `step`, and the recipe has no "
            "`rewards`; give it one of them"
        )
    return environments


def open_environments(rollout: RolloutConfig, task: Task | None) -> Environments | None:
    """The worlds that a `rollout` section names, else those of the task. ConfigError."""
    if rollout.takes_turns:
        named = ", ".join([*filter(None, [rollout.environment]), *rollout.tools])
        log.warning("alignkit: rollout.environment runs code from %s in processes apart", named)
        return WorkerEnvironments(
            rollout.environment,
            rollout.tools,
            timeout=rollout.environment_timeout,
            memory_mb=rollout.environment_memory_mb,
        )
    if task is not None and task.environment is not None:
        return LocalEnvironments(task.environment)
    return None


def turn_sampler(
    context: RunContext,
    environments: Environments,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    seed: int,
) -> TurnSampler:
    """Plays episodes of these prompts with `sampler`. ConfigError, DataError."""
    rollout = context.recipe.rollout
    with context.pair.model("policy") as model:
        context_size = context_length(model)
    return TurnSampler(
        sampler,
        environments,
        _renderer(context, environments, prompts),
        turns=rollout.turns,
        max_new_tokens=rollout.max_new_tokens,
        context=context_size,
        seed=seed,
    )


def _renderer(
    context: RunContext, environments: Environments, prompts: Sequence[Prompt]
) -> Renderer:
    recipe = context.recipe
    renderer = renderer_for(context.pair, recipe.data, environments, prompts)
    if renderer.rewrites and recipe.rollout.rewritten == "refuse":
        raise ConfigError(
            f"{recipe.origin.at(('rollout', 'rewritten'))}: the chat template rewrites earlier "
            "turns once a conversation goes on, and `rollout.rewritten` is `refuse`; set "
            "data.chat_template to one that repeats them, or rollout.rewritten=segments"
        )
    if renderer.rewrites and context.accelerator.is_main_process:
        log.warning(
            "the chat template rewrites earlier turns once a conversation goes on: each turn is "
            "trained on in the context that it was drawn in, as a segment of its episode"
        )
    return renderer


def shown_episodes(
    context: RunContext, environments: Environments, prompts: Sequence[Prompt]
) -> Callable[[int], list[dict[str, Any]]]:
    """step -> rows for samples.jsonl: the same prompts and the same noise each time, so that only
    the policy differs.
    """
    rollout = context.recipe.rollout
    settings = rollout.model_copy(update={"engine": "hf"})
    sampler = make_sampler(settings, context.pair, seed=context.recipe.train.seed, exact=False)
    player = turn_sampler(context, environments, sampler, prompts, context.recipe.train.seed)

    def samples(step: int) -> list[dict[str, Any]]:
        rows = player.episodes(prompts, Draw(1), step=0, prompt_ids=range(len(prompts)))
        return [{"step": step, **as_row(episode)} for (episode,) in rows]

    return samples


def as_row(episode: Episode) -> dict[str, Any]:
    """An episode turn by turn, as samples.jsonl and reports show it."""
    outcome = {"reward": episode.reward} if episode.failed is None else {"failed": episode.failed}
    return {"prompt": episode.prompt, "turns": list(episode.messages), **outcome}
