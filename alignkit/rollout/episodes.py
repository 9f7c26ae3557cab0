"""Episodes: what is known of one while it is played, and what came of it.

An episode is one sequence of tokens. Those that the policy has drawn are its own and are trained
on; those that the environment adds are foreign: they are attended to, nothing else. Where a chat
template rewrites history, or the environment says what is read in its place, the sequence ends and a
new one begins: an episode then has several segments, each with its own context.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from alignkit.rollout.environment import Answer
from alignkit.rollout.protocol import Sample
from alignkit.rollout.renderer import Message, Renderer

FOREIGN = -1  # the turn of a token that the policy has not drawn


@dataclass(frozen=True)
class Segment:
    """A sequence of tokens after one context, on the CPU. Everything is 0 (the turn -1) at foreign
    tokens.
    """

    prompt: Tensor  # [P] int64, the context that it continues
    ids: Tensor  # [T] int64
    logps: Tensor  # [T] float32, of own tokens
    mask: Tensor  # [T] bool: own tokens
    turns: Tensor  # [T] int64, counted through the whole episode
    states: Tensor  # [T] int64, key of the state in which the turn was taken
    rewards: Tensor  # [T] float64, at the last own token of a turn


@dataclass(frozen=True)
class Episode:
    """What came of one completion."""

    segments: Sequence[Segment]
    prompt: Any  # with what the environment has added to it, in the form of the data
    messages: Sequence[Message]  # the turns in order: "assistant", "tool" and "user"
    ended: bool  # the last turn of the policy ended by itself; False: cut at the cap
    calls: int = 0  # of tools
    failures: int = 0  # calls that were answered by an error
    failed: str | None = None  # why the episode has no result; it has no segments then
    mixed: bool = False  # some turn was drawn with more than one version of the weights

    @property
    def own_tokens(self) -> int:
        """Tokens that the policy has drawn."""
        return sum(int(segment.mask.sum()) for segment in self.segments)

    @property
    def tokens(self) -> int:
        """All tokens after the prompt, the environment's included."""
        return sum(len(segment.ids) for segment in self.segments)

    @property
    def turns(self) -> int:
        """Turns of the policy."""
        return sum(message["role"] == "assistant" for message in self.messages)

    @property
    def reward(self) -> float:
        """The sum of what the environment gave."""
        return sum(float(segment.rewards.sum()) for segment in self.segments)


@dataclass
class Play:
    """An episode while it is played."""

    row: int  # of its prompt, in the call
    completion: int
    prompt_id: int
    given: Any  # the prompt as it stood in the data
    place: int = 0  # of its environment
    opened: Any = None  # the prompt with what the environment has added
    failed: str | None = None
    state: str | None = None  # in which the next turn is taken
    instead: str | None = None  # what it reads behind the prompt in place of all that was said
    begun: Any = None  # what the present context began with, in the prompt's form
    since: int = 0  # the first message that was said in it

    context: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    first: int = 0  # tokens of the first context
    own: int = 0  # tokens drawn so far
    ended: bool = False
    cached: Any = None  # what the sampler has computed of what was read
    messages: list[Message] = field(default_factory=list)
    calls: int = 0
    failures: int = 0

    # One entry per turn: its tokens, the state it was taken in, its reward. `heard_after` are the
    # foreign tokens behind it, `begins` its context where a new segment begins with it.
    samples: list[Sample] = field(default_factory=list)
    states: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    heard_after: list[Tensor] = field(default_factory=list)
    begins: list[Tensor | None] = field(default_factory=list)
    read: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def start(self, context: Tensor) -> None:
        """The first context."""
        self.context = context
        self.first = len(context)
        self.read = context
        self.begins.append(context)

    def say(self, sample: Sample, renderer: Renderer) -> None:
        """Another turn of the policy."""
        self.states.append(_key(self.state, self.read))
        self.messages.append(renderer.read(self.read, sample.ids))
        self.samples.append(replace(sample, cached=None))
        self.cached = sample.cached
        self.rewards.append(0.0)
        self.heard_after.append(sample.ids[:0])
        self.own += len(sample.ids)
        self.ended = sample.ended
        self.read = torch.cat([self.read, sample.ids])

    @property
    def pending_calls(self) -> list[dict[str, Any]]:
        """The calls of the last turn."""
        calls = self.messages[-1].get("tool_calls") or []
        return [
            {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
            for call in calls
        ]

    def heard(self, answer: Answer) -> list[Message]:
        """Take note of the answer to the last turn; the messages that go on from it, none where
        the episode is over.
        """
        if "results" in answer:
            self.calls += len(answer["results"])
            self.failures += sum(result["failed"] for result in answer["results"])
            return [
                {"role": "tool", "name": call["name"], "content": result["content"]}
                for call, result in zip(self.pending_calls, answer["results"])
            ]
        self.rewards[-1] += answer["reward"]
        self.instead = answer["context"]
        if self.instead is not None:
            return [{"role": "user", "content": self.instead}]
        return [] if answer["done"] else [{"role": "user", "content": answer["text"] or ""}]

    def hear(self, foreign: Tensor) -> None:
        """Foreign tokens behind the last turn."""
        self.heard_after[-1] = foreign
        self.read = torch.cat([self.read, foreign])
        self.begins.append(None)

    def rewritten(self, context: Tensor) -> None:
        """A new segment begins."""
        self.read = context
        self.begins.append(context)

    def episode(self) -> Episode:
        """What came of it."""
        outcome: dict[str, Any] = {
            "calls": self.calls,
            "failures": self.failures,
            "failed": self.failed,
            "mixed": any(sample.mixed for sample in self.samples),
        }
        if self.failed is not None:
            return Episode([], self.opened or self.given.text, self.messages, False, **outcome)

        starts = [turn for turn, context in enumerate(self.begins) if context is not None]
        starts = [turn for turn in starts if turn < len(self.samples)]
        segments = [
            self._segment(range(start, end))
            for start, end in zip(starts, [*starts[1:], len(self.samples)])
        ]
        return Episode(segments, self.opened, self.messages, self.ended, **outcome)

    def _segment(self, turns: range) -> Segment:
        context = self.begins[turns.start]
        assert context is not None
        parts = [self._turn(turn) for turn in turns]
        return Segment(context, *(torch.cat(column) for column in zip(*parts, strict=True)))

    def _turn(self, turn: int) -> tuple[Tensor, ...]:
        """A turn with the foreign tokens behind it, as the tensors of a segment."""
        sample = self.samples[turn]
        foreign = self.heard_after[turn]
        own = len(sample.ids)
        total = own + len(foreign)

        mask = torch.arange(total) < own
        rewards = torch.zeros(total, dtype=torch.float64)
        rewards[own - 1] = self.rewards[turn]
        return (
            torch.cat([sample.ids, foreign]),
            torch.cat([sample.logps, sample.logps.new_zeros(len(foreign))]),
            mask,
            torch.where(mask, turn, FOREIGN),
            torch.where(mask, self.states[turn], 0),
            rewards,
        )


def _key(state: str | None, read: Tensor) -> int:
    """64 bits of the state, or of everything read so far where the environment names none."""
    content = repr(read.tolist()) if state is None else f"state {state}"
    return int.from_bytes(sha256(content.encode()).digest()[:8], "big", signed=True)
