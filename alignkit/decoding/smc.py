"""Sequential Monte Carlo over completions: particles that grow token by token, weighed by twists.

The target is sigma(y) = p(y) e^(r(y) / beta) / Z. A twist psi(s) > 0 guesses at each prefix what
reward will come; l = log psi. Whatever the twist, E[Zhat] = Z, and with more particles the output
comes closer to sigma; a good twist needs fewer (Zhao et al. 2024, arXiv:2404.17546).

Axes: R independent runs, N particles (slots) of each, V tokens; L of the R * N slots are live, that
is not yet ended. Slots are numbered through: run * N + slot.
"""

import math
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from alignkit.decoding.particles import check_alive, resampled
from alignkit.rollout.noise import gumbel, row_keys, uniform

# Ended slots leave the models' batch once this share of it is left.
_COMPACT_AT = 0.75


@dataclass(frozen=True)
class Schedule:
    """How particles are grown and resampled."""

    particles: int  # N
    max_new_tokens: int  # the end token included
    every: int  # tokens between two chances to resample
    ess: float  # resample below this share of effective particles
    guided: bool = False  # propose p psi / c instead of p; needs a twist of every next token


class World(Protocol):
    """What particles are made of: rows that grow by one token at a time. It begins with a row for
    each slot.
    """

    stop: Tensor  # tokens that end a completion

    def logprobs(self) -> Tensor:
        """Log-probs of the next token of every row, [L, V]."""
        ...

    def twists(self) -> Tensor:
        """l of every row with each token appended, [L, V]: what a guided proposal goes by."""
        ...

    def twist_of(self, tokens: Tensor) -> Tensor | None:
        """l of every row with its token [L] appended, [L]; None without a twist by token. It is
        asked for where the proposal is not guided.
        """
        ...

    def advance(self, tokens: Tensor) -> None:
        """Append one token to each row, [L]."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken more than once."""
        ...

    def unfinished(self, slots: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor | None:
        """l of the unfinished texts of these slots [L]; None where there is no twist by text.

        tokens [L, T], of which the first lengths [L] count.
        """
        ...

    def finished(self, slots: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """r / beta of the finished completions of these slots, as for `unfinished`: [L]."""
        ...


class Noise(Protocol):
    """The random numbers of R runs."""

    def tokens(self, logprobs: Tensor, slots: Tensor, position: int) -> Tensor:
        """A token [L] from each of the laws [L, V] of these slots."""
        ...

    def uniforms(self, position: int) -> Tensor:
        """A number in [0, 1) for each run, [R]."""
        ...


@dataclass(frozen=True)
class CounterNoise:
    """Noise that depends on (seed, step, prompt, completion, slot, position) alone.

    It belongs to the slot, not to the lineage: two copies of one particle go on differently.
    """

    seed: int
    step: int
    prompts: Tensor  # [R] prompt ids
    completions: Tensor  # [R]: the number of the run among its prompt's
    particles: int

    def tokens(self, logprobs: Tensor, slots: Tensor, position: int) -> Tensor:
        """See `Noise`."""
        run = slots // self.particles
        number = self.completions[run] * self.particles + slots % self.particles
        positions = torch.full_like(slots, position)
        keys = row_keys(self.seed, self.step, self.prompts[run], number, positions)
        return (gumbel(keys, logprobs.shape[-1]) + logprobs).argmax(-1)

    def uniforms(self, position: int) -> Tensor:
        """See `Noise`."""
        positions = torch.full_like(self.prompts, position)
        keys = row_keys(self.seed, self.step, self.prompts, -1 - self.completions, positions)
        return uniform(keys, 1)[:, 0].double()


@dataclass(frozen=True)
class Outcome:
    """What R runs end with."""

    tokens: Tensor  # [R, N, T] int64
    lengths: Tensor  # [R, N]
    ended: Tensor  # [R, N] bool: by an end token, not at the cap
    tilts: Tensor  # [R, N] r / beta of each particle
    log_weights: Tensor  # [R, N] at the end
    log_z: Tensor  # [R] log Zhat
    chosen: Tensor  # [R] the slot that is output, drawn from the weights
    sampled: Tensor  # [R] tokens that were computed
    reward_calls: Tensor  # [R] texts that the reward scored

    def of_run(self, number: int) -> "Outcome":
        """The outcome of one of the runs, in tensors of one row."""
        rows = {f.name: getattr(self, f.name)[number : number + 1] for f in fields(self)}
        return Outcome(**rows)

    def of_chosen(self, name: str) -> Tensor:
        """A field [R, N, ...] at the chosen slots: [R, ...]."""
        values: Tensor = getattr(self, name)
        return values[torch.arange(len(values), device=values.device), self.chosen]


def run_particles(
    world: World, noise: Noise, schedule: Schedule, runs: int, given: Tensor | None = None
) -> Outcome:
    """Grow the particles of `runs` runs to their end.

    With `given` [R, T] (tokens, whatever follows an end unread) the runs are conditional: slot 0
    holds that completion and always survives. NumericsError where all weights of a run are 0.
    """
    state = _Run(world, noise, schedule, runs, given)
    for position in range(schedule.max_new_tokens):
        state.grow(position)
        if state.is_over():
            break
        if (position + 1) % schedule.every == 0:
            state.resample(position)
            if state.is_over():  # those that were still to grow found no place
                break
        else:
            state.compact()
        state.advance()
    return state.outcome()


class _Run:
    """The slots of R runs while they grow: flat tensors of R * N."""

    def __init__(
        self, world: World, noise: Noise, schedule: Schedule, runs: int, given: Tensor | None
    ) -> None:
        self.world = world
        self.noise = noise
        self.schedule = schedule
        self.runs = runs
        self.given = given

        slots = runs * schedule.particles
        device = world.stop.device
        self.tokens = torch.zeros(
            (slots, schedule.max_new_tokens), dtype=torch.int64, device=device
        )
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self.over = torch.zeros(slots, dtype=torch.bool, device=device)  # ended, or at the cap
        self.ended = torch.zeros_like(self.over)
        self.weighed = torch.zeros_like(self.over)  # over, and its reward is in its weight
        self.log_weights = torch.zeros(slots, dtype=torch.float64, device=device)
        self.twist = torch.zeros_like(self.log_weights)  # l so far
        self.tilts = torch.zeros_like(self.log_weights)
        self.log_z = torch.zeros(runs, dtype=torch.float64, device=device)
        self.sampled = torch.zeros(runs, dtype=torch.int64, device=device)
        self.reward_calls = torch.zeros_like(self.sampled)
        self.live = torch.arange(slots, device=device)  # the slots of the world's rows

    def grow(self, position: int) -> None:
        """One more token for every live slot."""
        live = self.live
        laws = self.world.logprobs()
        if self.schedule.guided:
            twists = self.world.twists()
            joint = laws + twists
            log_c = torch.logsumexp(joint, dim=-1)
            laws = joint - log_c[:, None]
            self.log_weights[live] += (log_c - self.twist[live]).where(~self.over[live], 0.0)

        tokens = self.noise.tokens(laws, live, position)
        if self.given is not None:
            run = live // self.schedule.particles
            first = live % self.schedule.particles == 0
            tokens = torch.where(first, self.given[run, position], tokens)

        # Rows of slots that are over stay among the others for a while; nothing of them is read.
        growing = ~self.over[live]
        slots = live[growing]
        self.tokens[slots, position] = tokens[growing]
        self.lengths[slots] = position + 1
        self.sampled += self._per_run(slots)
        if self.schedule.guided:
            self.twist[slots] = twists.gather(-1, tokens[:, None])[growing, 0].double()
        else:
            twist = self.world.twist_of(tokens)
            if twist is not None:
                after = twist[growing].double()
                self.log_weights[slots] += after - self.twist[slots]
                self.twist[slots] = after

        stopped = torch.isin(tokens[growing], self.world.stop)
        self.ended[slots] = stopped
        self.over[slots] = stopped | (position + 1 == self.schedule.max_new_tokens)

    def is_over(self) -> bool:
        """Whether no slot grows any more."""
        return bool(self.over.all())

    def advance(self) -> None:
        """Give the world the last token of every live slot."""
        last = (self.lengths[self.live] - 1).clamp(min=0)
        self.world.advance(self.tokens[self.live, last])

    def compact(self) -> None:
        """Let the world forget slots that are over, once there are enough of them."""
        going_on = ~self.over[self.live]
        if int(going_on.sum()) <= _COMPACT_AT * len(going_on):
            self.world.select(going_on.nonzero()[:, 0])
            self.live = self.live[going_on]

    def weigh(self) -> None:
        """Put the reward of slots that are over into their weights."""
        due = (self.over & ~self.weighed).nonzero()[:, 0]
        if len(due):
            self.tilts[due] = self.world.finished(due, self.tokens[due], self.lengths[due]).double()
            self.log_weights[due] += self.tilts[due] - self.twist[due]
            self.weighed[due] = True
            self.reward_calls += self._per_run(due)

    def resample(self, position: int) -> None:
        """Weigh all slots, and where too few of a run count, take them anew."""
        self.weigh()
        open_slots = (~self.over).nonzero()[:, 0]
        texts = (self.tokens[open_slots], self.lengths[open_slots])
        twists = self.world.unfinished(open_slots, *texts)
        if twists is not None:
            self.log_weights[open_slots] += twists.double() - self.twist[open_slots]
            self.twist[open_slots] = twists.double()
            self.reward_calls += self._per_run(open_slots)

        shape = (self.runs, self.schedule.particles)
        weights, ancestors, gained = resampled(
            self.log_weights.reshape(shape),
            self.noise.uniforms(position),
            ess=self.schedule.ess,
            keep_first=self.given is not None,
        )
        self.log_z += gained
        first = torch.arange(self.runs, device=ancestors.device) * self.schedule.particles
        self._take((first[:, None] + ancestors).flatten())
        self.log_weights = weights.flatten()

    def _take(self, ancestors: Tensor) -> None:
        """Every slot goes on from its ancestor, [R * N]."""
        row_of = torch.full_like(ancestors, -1)  # slot -> row of the world
        row_of[self.live] = torch.arange(len(self.live), device=ancestors.device)

        for name in ("tokens", "lengths", "over", "ended", "weighed", "twist", "tilts"):
            setattr(self, name, getattr(self, name)[ancestors])
        self.live = (~self.over).nonzero()[:, 0]
        rows = row_of[ancestors[self.live]]
        self.world.select(rows)

    def outcome(self) -> Outcome:
        """What the runs end with, and the slot that each outputs."""
        self.weigh()
        shape = (self.runs, self.schedule.particles)
        weights = self.log_weights.reshape(shape)
        check_alive(weights)

        sums = weights.softmax(1).cumsum(1)
        points = self.noise.uniforms(self.schedule.max_new_tokens)[:, None] * sums[:, -1:]
        chosen = torch.searchsorted(sums, points, right=True)[:, 0]
        return Outcome(
            tokens=self.tokens.reshape(*shape, -1),
            lengths=self.lengths.reshape(shape),
            ended=self.ended.reshape(shape),
            tilts=self.tilts.reshape(shape),
            log_weights=weights,
            log_z=self.log_z + torch.logsumexp(weights, dim=1) - math.log(shape[1]),
            chosen=chosen.clamp(max=shape[1] - 1),
            sampled=self.sampled,
            reward_calls=self.reward_calls,
        )

    def _per_run(self, slots: Tensor) -> Tensor:
        """How many of the slots belong to each run, [R]."""
        return torch.bincount(slots // self.schedule.particles, minlength=self.runs)
