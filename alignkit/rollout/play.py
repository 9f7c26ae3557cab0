"""Episodes with a finished model: what `alignkit generate --environment` and examples use."""

from collections.abc import Mapping, Sequence
from typing import Any

from alignkit.batches import Draw
from alignkit.config.data import DataConfig
from alignkit.config.rollout import MAX_NEW_TOKENS
from alignkit.data.prompts import Prompt
from alignkit.errors import ConfigError, DataError
from alignkit.policies.module import context_length
from alignkit.rollout.environment_pool import Environments
from alignkit.rollout.episodes import Episode
from alignkit.rollout.generate import prompt_ids
from alignkit.rollout.hf import HFSampler
from alignkit.rollout.protocol import Models, stop_tokens
from alignkit.rollout.renderer import ChatRenderer, Renderer, TextRenderer
from alignkit.rollout.turns import TurnSampler


def play(
    models: Models,
    prompts: Sequence[Any],
    environments: Environments,
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    completions: int = 1,
    turns: int = 8,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[list[Episode]]:
    """`completions` episodes for each prompt, a text or the messages of a chat.

    `rows` are the further columns that `reset` gets. Prompt i sees the same noise in every call
    with the same seed, so that two models are compared on equal terms. Raises ConfigError and
    DataError.
    """
    columns = rows or [{} for _ in prompts]
    given = [
        Prompt(prompt_ids(prompt, models.tokenizer), prompt, f"prompt {number + 1}", row)
        for number, (prompt, row) in enumerate(zip(prompts, columns, strict=True))
    ]
    with models.model("policy") as model:
        context = context_length(model)
    player = TurnSampler(
        HFSampler(models, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed),
        environments,
        renderer_for(models, DataConfig(), environments, given),
        turns=turns,
        max_new_tokens=max_new_tokens,
        context=context,
        seed=seed,
    )
    return player.episodes(given, Draw(completions), step=0, prompt_ids=range(len(given)))


def renderer_for(
    models: Models, config: DataConfig, environments: Environments, prompts: Sequence[Prompt]
) -> Renderer:
    """The renderer of these prompts' form. DataError where they have two, ConfigError for tools
    beside plain text.
    """
    schemas = environments.about.schemas
    chats = {not isinstance(prompt.text, str) for prompt in prompts}
    if len(chats) > 1:
        raise DataError(
            "some prompts are chats and some plain text; episodes need one form for all of them"
        )
    if chats == {True}:
        return ChatRenderer(models.tokenizer, config, schemas, stop_tokens(models))
    if schemas:
        raise ConfigError(
            "rollout.tools: tools are called through a chat template, and the prompts are plain "
            "text; write them as messages, or give the environment a method `step`"
        )
    return TextRenderer(models.tokenizer, config)


def transcript(episode: Episode) -> str:
    """An episode as a person reads it, one line per turn."""
    outcome = f"reward     {episode.reward:g}" if episode.failed is None else episode.failed
    return "\n".join([f"prompt     {_words(episode.prompt)}", *told(episode), outcome])


def told(episode: Episode) -> list[str]:
    """Its turns, one line each."""
    lines = []
    for message in episode.messages:
        who = {"assistant": "policy", "tool": message.get("name", "tool")}
        words = str(message["content"]).strip()
        calls = [call["function"] for call in message.get("tool_calls") or []]
        words = " ".join([words, *(f"{c['name']}({_arguments(c['arguments'])})" for c in calls)])
        lines.append(f"{who.get(message['role'], 'world'):10} {words.strip() or '(nothing)'}")
    return lines


def _words(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _arguments(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
