"""Episodes of several turns: the policy draws a turn, the environment answers, the policy goes on."""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import Draw
from alignkit.errors import DataError
from alignkit.rollout.environment import Answer, Question
from alignkit.rollout.environment_pool import Environments
from alignkit.rollout.episodes import Episode, Play
from alignkit.rollout.protocol import Continuation, Sample, Sampler
from alignkit.rollout.renderer import Message, Renderer


class TurnSampler:
    """Plays episodes with any sampler: one batch of all that are still going on, turn by turn.

    turns           most turns of the policy in an episode
    max_new_tokens  most tokens of an episode after its prompt, the environment's included
    context         tokens that the model can read at once
    seed            of what the environments draw; the policy's noise is the sampler's
    """

    def __init__(
        self,
        sampler: Sampler,
        environments: Environments,
        renderer: Renderer,
        *,
        turns: int,
        max_new_tokens: int,
        context: int,
        seed: int,
    ) -> None:
        self.sampler = sampler
        self.environments = environments
        self.renderer = renderer
        self.turns = turns
        self.max_new_tokens = max_new_tokens
        self.context = context
        self.seed = seed

    @property
    def tools(self) -> bool:
        """Whether there are tools to call."""
        return bool(self.environments.about.schemas)

    def sync(self) -> None:
        """As `Sampler.sync`."""
        self.sampler.sync()

    def episodes(
        self, prompts: Sequence[Any], draw: Draw, *, step: int, prompt_ids: Sequence[int]
    ) -> list[list[Episode]]:
        """`draw.n` episodes for each prompt (`alignkit.data.prompts.Prompt`); see `Sampler.sample`
        for `step` and `prompt_ids`.

        DataError where the environment begins the episodes of one prompt with different texts.
        """
        assert draw.n is not None
        plays = [
            Play(i, completion, prompt_ids[i], prompt)
            for i, prompt in enumerate(prompts)
            for completion in range(draw.n)
        ]
        for place, play in enumerate(plays):
            play.place = place
        self._begin(plays, step)

        first_turns = self._first_turns(plays, prompts, draw, step, prompt_ids)
        live = [play for play in plays if play.failed is None]
        for turn in range(self.turns):
            last = turn + 1 == self.turns
            samples = first_turns
            if turn > 0:
                samples = self._next_turns(live, draw, step, last=last)
            for play, sample in zip(live, samples, strict=True):
                play.say(sample, self.renderer)
            live = self._answered(live, last=last)
            if not live:
                break

        self._rewarded([play for play in plays if play.failed is None])
        episodes = [play.episode() for play in plays]
        return [episodes[i : i + draw.n] for i in range(0, len(plays), draw.n)]

    def _begin(self, plays: Sequence[Play], step: int) -> None:
        """Reset the environments of all episodes; those of one prompt begin alike."""
        questions: list[Question] = [
            {
                "do": "reset",
                "row": {"prompt": play.given.text, **play.given.columns},
                "seed": _seed(self.seed, step, play.prompt_id),
            }
            for play in plays
        ]
        texts: dict[int, str | None] = {}
        for play, answer in zip(plays, self._ask(plays, questions)):
            if play.failed is not None:
                continue
            text = answer["text"]
            if texts.setdefault(play.row, text) != text:
                raise DataError(
                    f"{play.given.uid}: the environment began two episodes of this prompt with "
                    f"different texts, {texts[play.row]!r} and {text!r}; draw what differs from "
                    "the number that `seed` is given"
                )
            play.opened = play.begun = self.renderer.opened(play.given.text, text)
            # A prompt to which nothing is added stays as the data made it.
            as_given = text is None and not self.tools
            play.start(play.given.ids if as_given else self.renderer.start(play.opened))

    def _first_turns(
        self,
        plays: Sequence[Play],
        prompts: Sequence[Any],
        draw: Draw,
        step: int,
        prompt_ids: Sequence[int],
    ) -> list[Sample]:
        """The first turn of every episode that has begun: sampled as completions are, so that an
        episode of one turn is a completion.
        """
        contexts = {play.row: play.context for play in plays if play.failed is None}
        rows = sorted(contexts)
        drawn = self.sampler.sample(
            [contexts[row] for row in rows],
            draw,
            step=step,
            prompt_ids=[prompt_ids[row] for row in rows],
            keep=self.turns > 1,
        )
        samples = dict(zip(rows, drawn, strict=True))
        return [samples[play.row][play.completion] for play in plays if play.failed is None]

    def _next_turns(
        self, live: Sequence[Play], draw: Draw, step: int, *, last: bool
    ) -> list[Sample]:
        """One more turn of each episode, with the noise of its own completion."""
        drawn = self.sampler.sample(
            [play.read for play in live],
            replace(draw, n=1),
            step=step,
            prompt_ids=[play.prompt_id for play in live],
            continued=[
                Continuation(play.completion, play.own, self._room(play), play.cached)
                for play in live
            ],
            keep=not last,
        )
        return [sample for (sample,) in drawn]

    def _room(self, play: Play) -> int:
        """How many more tokens an episode may have."""
        length = len(play.read)
        return min(self.max_new_tokens - (length - play.first), self.context - length)

    def _answered(self, live: Sequence[Play], *, last: bool) -> list[Play]:
        """Let the environments answer the turns just drawn; the episodes that go on."""
        steps = self.environments.about.steps
        asked: list[Play] = []
        questions: list[Question] = []
        for play in live:
            calls = play.pending_calls
            if not play.ended or (not steps and (last or not calls)):
                continue  # cut at the cap, or nothing to answer
            asked.append(play)
            text = play.messages[-1]["content"]
            questions.append(
                {"do": "step", "text": text} if steps else {"do": "tools", "calls": calls}
            )

        going_on = []
        for play, answer in zip(asked, self._ask(asked, questions)):
            if play.failed is not None:
                continue
            messages = play.heard(answer)
            if messages and not last and self._goes_on(play, messages):
                going_on.append(play)
        return going_on

    def _goes_on(self, play: Play, messages: Sequence[Message]) -> bool:
        """Add the environment's messages, unless they leave no room for another turn: an episode
        never ends in foreign tokens.
        """
        context = self._new_context(play, messages)
        if context is not None:
            if not self._fits(play, context):
                return False
            play.rewritten(context)
        else:
            added = self.renderer.follow(messages)
            if not self._fits(play, torch.cat([play.read, added])):
                return False
            play.hear(added)
        play.messages += messages
        return True

    def _new_context(self, play: Play, messages: Sequence[Message]) -> Tensor | None:
        """What the next turn reads where it does not go on from what was read; None where it does."""
        if play.instead is not None:
            play.begun = self.renderer.opened(play.opened, play.instead)
            play.since = len(play.messages) + len(messages)
            # With nothing in place of what was said, it is what the first turn has read.
            return self.renderer.start(play.begun) if play.instead else play.context
        if self.renderer.rewrites:
            return self.renderer.start([*play.begun, *play.messages[play.since :], *messages])
        return None

    def _fits(self, play: Play, read: Tensor) -> bool:
        return len(read) < min(self.max_new_tokens + play.first, self.context)

    def _rewarded(self, plays: Sequence[Play]) -> None:
        """Ask for what the environments give at the end."""
        if not self.environments.about.rewards:
            return
        questions: list[Question] = [{"do": "reward"} for _ in plays]
        for play, answer in zip(plays, self._ask(plays, questions)):
            if play.failed is None:
                play.rewards[-1] += answer["reward"]

    def _ask(self, plays: Sequence[Play], questions: Sequence[Question]) -> list[Answer]:
        """The answers; takes note of those that say that an episode cannot go on."""
        calls = [(play.place, question) for play, question in zip(plays, questions)]
        answers = self.environments.ask(calls) if calls else []
        for play, answer in zip(plays, answers, strict=True):
            play.failed = answer.get("failed")
            play.state = answer.get("state")
        return answers


def _seed(seed: int, step: int, prompt_id: int) -> int:
    """What the episodes of one prompt are seeded with: 63 bits."""
    digest = sha256(f"episode {seed} {step} {prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
