"""Episodes as bundles, and the figures that describe them."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import Bundle
from alignkit.rewards.call import RewardCall, call_reward
from alignkit.rollout.episodes import Episode, Segment

MOST_EPISODES = 1 << 20  # of one prompt
LISTED_REASONS = 3  # why episodes failed, in one line of the log

log = logging.getLogger("alignkit")


def bundles_of(
    prompt: Any, episodes: Sequence[Episode], scores: Sequence[float], group: int
) -> list[Bundle]:
    """The episodes of one prompt that have a result: segments with the same context are the
    completions of one bundle, so that without rewritten histories there is one bundle.

    Rows: "score" of the whole episode, "group" (the prompt's number in the rollout), "episode"
    (unique over the rollout), "segment" and "episode_tokens" (own tokens of the whole episode).
    Tokens: "behavior", "turn", "state" and "reward".
    """
    episodes = [
        _with_reward_at_the_end(episode, score - episode.reward)
        for episode, score in zip(episodes, scores, strict=True)
    ]
    by_context: dict[bytes, list[tuple[Segment, dict[str, float]]]] = {}
    for number, (episode, score) in enumerate(zip(episodes, scores, strict=True)):
        for place, segment in enumerate(episode.segments):
            rows = {
                "score": score,
                "group": group,
                "episode": group * MOST_EPISODES + number,
                "segment": place,
                "episode_tokens": episode.own_tokens,
            }
            key = segment.prompt.numpy().tobytes()
            by_context.setdefault(key, []).append((segment, rows))
    return [_bundle(prompt.uid, members) for members in by_context.values()]


def _with_reward_at_the_end(episode: Episode, reward: float) -> Episode:
    """The episode with what its environment has not given, at its last own token."""
    *others, last = episode.segments
    rewards = last.rewards.clone()
    rewards[last.mask.nonzero()[-1]] += reward
    return replace(episode, segments=[*others, replace(last, rewards=rewards)])


def _bundle(uid: str, members: Sequence[tuple[Segment, dict[str, float]]]) -> Bundle:
    segments = [segment for segment, _ in members]
    rows: dict[str, Tensor] = {}
    for name in members[0][1]:
        dtype = torch.float64 if name == "score" else torch.int64
        rows[name] = torch.tensor([values[name] for _, values in members], dtype=dtype)
    return Bundle(
        segments[0].prompt,
        [segment.ids for segment in segments],
        [segment.mask for segment in segments],
        uid,
        rows,
        tokens={
            "behavior": [segment.logps for segment in segments],
            "turn": [segment.turns for segment in segments],
            "state": [segment.states for segment in segments],
            "reward": [segment.rewards for segment in segments],
        },
    )


def message_scores(
    reward: RewardCall,
    prompts: Sequence[Any],
    rows: Sequence[Sequence[Episode]],
    **columns: Any,
) -> list[list[float | None]]:
    """What `reward` makes of the messages of each prompt's episodes; None where it does not apply.

    It reads the opening that the world has written, where there is one. `columns` go to the reward.
    """
    opened = [
        SimpleNamespace(text=row[0].prompt if row else prompt.text, columns=prompt.columns)
        for prompt, row in zip(prompts, rows)
    ]
    texts = [
        [completion_text(episode, not isinstance(prompt.text, str)) for episode in row]
        for prompt, row in zip(prompts, rows)
    ]
    ids = [
        [[i for segment in episode.segments for i in segment.ids.tolist()] for episode in row]
        for row in rows
    ]
    return call_reward(reward, opened, texts, ids, **columns)


def completion_text(episode: Episode, chat: bool) -> Any:
    """What rewards read of an episode: its messages where the prompt is a chat, else one text."""
    if chat:
        return list(episode.messages)
    return "".join(message["content"] for message in episode.messages)


def episode_columns(rows: Sequence[Sequence[Any]], tools: bool) -> dict[str, list[float]]:
    """Values whose means describe the episodes of each prompt, under TRL's names where TRL has
    them.
    """
    every: list[Episode] = [episode for row in rows for episode in row]
    played = [episode for episode in every if episode.failed is None]
    columns: dict[str, list[float]] = {
        "rewards/environment": [episode.reward for episode in played],
        "episodes/failed": [episode.failed is not None for episode in every],
        "episodes/turns": [episode.turns for episode in played],
        "episodes/length": [episode.tokens for episode in played],
        "episodes/segments": [len(episode.segments) for episode in played],
    }
    if tools:
        columns["tools/call_frequency"] = [episode.calls for episode in every]
        # A call counts once, whichever episode it is of.
        calls = [(episode.failures, episode.calls) for episode in every]
        columns["tools/failure_frequency"] = [
            float(place < failures) for failures, count in calls for place in range(count)
        ]
    return columns


def warn_of_failures(prompts: Sequence[Any], rows: Sequence[Sequence[Episode]]) -> None:
    """One line in the log for the episodes that were set aside, P x K of these prompts: the most
    frequent reasons, each with the row where it came first.
    """
    first: dict[str, str] = {}
    reasons: Counter[str] = Counter()
    for prompt, row in zip(prompts, rows, strict=True):
        for episode in row:
            if episode.failed is not None:
                reasons[episode.failed] += 1
                first.setdefault(episode.failed, prompt.uid)
    if not reasons:
        return

    listed = [
        f"{reason} ({count}, first in {first[reason]})"
        for reason, count in reasons.most_common(LISTED_REASONS)
    ]
    further = len(reasons) - len(listed)
    log.warning(
        "%d of %d episodes failed and were set aside: %s%s",
        reasons.total(),
        sum(map(len, rows)),
        "; ".join(listed),
        f"; and {further} other reasons" if further else "",
    )
