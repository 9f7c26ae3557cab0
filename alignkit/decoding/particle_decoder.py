"""Particles of language models: the decoder, and the world that they grow in."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from alignkit.data.prompts import Prompt
from alignkit.decoding.certificate import kl_interval
from alignkit.decoding.decoders import Decoded
from alignkit.decoding.scoring import Scorer
from alignkit.decoding.smc import CounterNoise, Outcome, Schedule, run_particles
from alignkit.decoding.value import ValueHead, twists_of_likeliest
from alignkit.rollout.cache_probe import sampling_model
from alignkit.rollout.cached_model import CachedModel
from alignkit.rollout.protocol import Models, stop_tokens

VALUE = "value"  # the name of a learned value among the models

# Tokens whose learned value a guided proposal knows; the others, unlikely ones, share a guess.
CANDIDATES = 64


@dataclass(frozen=True)
class Run:
    """One completion of one prompt, whose particles it comes from."""

    prompt: int
    completion: int  # its number, of which the noise depends
    given: Tensor | None = None  # [T]: of a conditional run


@dataclass(frozen=True)
class ParticleDecoder:
    """SMC (Zhao et al. 2024, arXiv:2404.17546): particles of the model, resampled by twisted weights,
    of which one is output. Its KL is an interval from `fresh` conditional runs of each output; they
    are no part of the price.
    """

    models: Models
    scorer: Scorer
    schedule: Schedule
    beta: float
    twist_beta: float | None = None  # the twist is the reward of the text so far, divided by this
    value: ValueHead | None = None  # the twist, of the states that the model called VALUE gives
    fresh: int = 8
    seed: int = 0
    token_budget: int = 65536

    def decode(self, prompts: Sequence[Prompt], completions: int, *, step: int = 0) -> Decoded:
        """See `Decoder`. NumericsError where all weights of a run are 0, DataError for a reward that
        cannot score what it is asked.
        """
        shape = (len(prompts), completions)
        places = [(i, k) for i in range(shape[0]) for k in range(completions)]
        outcomes = self._outcomes(prompts, [Run(*place) for place in places], step)
        tilts = torch.tensor([float(o.of_chosen("tilts")) for o in outcomes], dtype=torch.float64)
        log_z = torch.cat([outcome.log_z.cpu() for outcome in outcomes])

        given = [_completion(outcome) for outcome in outcomes]
        # Those of one output follow one another, so that most of them share its rows.
        conditional = [
            Run(i, k * self.fresh + m, ids)
            for (i, k), ids in zip(places, given)
            for m in range(self.fresh)
        ]
        again = self._outcomes(prompts, conditional, -1 - step)
        fresh_z = torch.tensor([float(o.log_z) for o in again], dtype=torch.float64)
        low, high = kl_interval(tilts, log_z, fresh_z.reshape(len(places), self.fresh).T)

        def table(values: Sequence[float] | Tensor) -> np.ndarray:
            return np.array([float(value) for value in values]).reshape(shape)

        return Decoded(
            ids=[given[i * completions : (i + 1) * completions] for i in range(shape[0])],
            ended=table([float(o.of_chosen("ended")) for o in outcomes]),
            kl=table(high),
            kl_low=table(low) if self.fresh else np.zeros(shape),
            tokens=table([float(o.sampled) * (2 if self.value else 1) for o in outcomes]),
            reward_calls=table([float(o.reward_calls) for o in outcomes]),
        )

    @torch.no_grad()
    def _outcomes(self, prompts: Sequence[Prompt], runs: Sequence[Run], step: int) -> list[Outcome]:
        """The outcome of each run, in their order; they are grown together in batches."""
        outcomes: list[Outcome | None] = [None] * len(runs)
        for batch in self._batches(prompts, runs):
            together = self._together(prompts, [runs[place] for place in batch], step)
            for number, place in enumerate(batch):
                outcomes[place] = together.of_run(number)
        return [outcome for outcome in outcomes if outcome is not None]

    def _batches(self, prompts: Sequence[Prompt], runs: Sequence[Run]) -> Iterator[list[int]]:
        """Places of runs, short prompts first, as many as the token budget holds."""
        batch: list[int] = []
        for place in sorted(range(len(runs)), key=lambda i: len(prompts[runs[i].prompt].ids)):
            width = len(prompts[runs[place].prompt].ids) + self.schedule.max_new_tokens
            rows = (len(batch) + 1) * self.schedule.particles
            if batch and rows * width > self.token_budget:
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch

    def _together(self, prompts: Sequence[Prompt], runs: Sequence[Run], step: int) -> Outcome:
        """The outcome of one batch of runs, all conditional or none."""
        world = LanguageWorld(self, prompts, runs)
        device = world.stop.device
        noise = CounterNoise(
            self.seed,
            step,
            torch.tensor([run.prompt for run in runs], device=device),
            torch.tensor([run.completion for run in runs], device=device),
            self.schedule.particles,
        )

        given = None
        if runs[0].given is not None:
            given = torch.zeros((len(runs), self.schedule.max_new_tokens), dtype=torch.int64)
            for row, run in enumerate(runs):
                assert run.given is not None
                given[row, : len(run.given)] = run.given
            given = given.to(device)
        with ExitStack() as entered:
            for model in world.models:
                entered.enter_context(model.entered())
            return run_particles(world, noise, self.schedule, len(runs), given)


def _completion(outcome: Outcome) -> Tensor:
    """The tokens of the output of one run."""
    return outcome.of_chosen("tokens")[0, : int(outcome.of_chosen("lengths"))].cpu()


class LanguageWorld:
    """`World` of a batch of runs: rows of the model's cache, and of the learned value's where there
    is one.

    Rows that read the same have one of the model's rows between them: the particles of a prompt at
    their beginning, copies until they part, and the given completion of all runs that are
    conditional on it.
    """

    def __init__(self, decoder: ParticleDecoder, prompts: Sequence[Prompt], runs: Sequence[Run]):
        self.decoder = decoder
        self.prompts = prompts
        self.owners = [run.prompt for run in runs]
        names = ["policy", *([VALUE] if decoder.value else [])]
        self.models: list[CachedModel] = [
            sampling_model(decoder.models, name, 1.0) for name in names
        ]

        # Every prompt is read once, however many particles begin with it.
        unique = list(dict.fromkeys(run.prompt for run in runs))
        ids = [prompts[place].ids for place in unique]
        room = decoder.schedule.max_new_tokens
        rooms = [room] * len(ids)
        self._take([model.prefill(ids, rooms) for model in self.models])
        device = self.laws.device
        places = {prompt: place for place, prompt in enumerate(unique)}
        owner = torch.tensor([places[run.prompt] for run in runs], device=device)
        self.row = owner.repeat_interleave(decoder.schedule.particles)  # [L]: the model's
        self.stop = torch.tensor(stop_tokens(decoder.models), device=device)

    def _take(self, outputs: list[Tensor]) -> None:
        """Keep what the models say of the next token: laws [M, V] of their rows, and states."""
        wide = torch.promote_types(outputs[0].dtype, torch.float32)
        self.laws = outputs[0].to(wide).log_softmax(-1)
        self.states = outputs[-1]  # of the learned value [M, H]

    def logprobs(self) -> Tensor:
        """See `World`."""
        return self.laws[self.row]

    def twists(self) -> Tensor:
        """See `World`."""
        value = self.decoder.value
        assert value is not None, "a guided proposal needs a learned value"
        known = partial(value.of, self.states)
        return twists_of_likeliest(self.laws, known, CANDIDATES).double()[self.row]

    def twist_of(self, tokens: Tensor) -> Tensor | None:
        """See `World`."""
        value = self.decoder.value
        return None if value is None else value.of(self.states[self.row], tokens[:, None])[:, 0]

    def advance(self, tokens: Tensor) -> None:
        """See `World`."""
        size = self.laws.shape[-1]
        each, self.row = (self.row * size + tokens).unique(return_inverse=True)
        rows = each // size
        if not torch.equal(rows, torch.arange(len(self.laws), device=rows.device)):
            for model in self.models:
                model.select(rows)
        self._take([model.advance(each % size) for model in self.models])

    def select(self, rows: Tensor) -> None:
        """See `World`."""
        self.row = self.row[rows]

    def unfinished(self, slots: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor | None:
        """See `World`."""
        if self.decoder.twist_beta is None or not len(slots):
            return None
        rewards = self.decoder.scorer.of_unfinished(*self._texts(slots, tokens, lengths))
        return (rewards / self.decoder.twist_beta).to(slots.device)

    def finished(self, slots: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """See `World`."""
        owners, texts = self._texts(slots, tokens, lengths)
        rewards = self.decoder.scorer.of_completions(owners, [[ids] for ids in texts])[:, 0]
        return (rewards / self.decoder.beta).to(slots.device)

    def _texts(
        self, slots: Tensor, tokens: Tensor, lengths: Tensor
    ) -> tuple[list[Prompt], list[Tensor]]:
        """The prompt and the tokens so far of each of these slots."""
        particles = self.decoder.schedule.particles
        owners = [self.prompts[self.owners[slot // particles]] for slot in slots.tolist()]
        rows = zip(tokens.cpu(), lengths.tolist(), strict=True)
        return owners, [ids[:length] for ids, length in rows]
