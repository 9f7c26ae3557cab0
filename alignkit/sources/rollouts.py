"""Rollouts: the policy answers prompts, the answers are scored or judged, and they become the
bundles of the next optimiser steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from alignkit.batches import Bundle, Draw
from alignkit.distributed.errors import raise_on_all_ranks
from alignkit.errors import DataError
from alignkit.objectives.base import Objective
from alignkit.policies.pair import PolicyPair
from alignkit.rollout.importance import Correction
from alignkit.rollout.protocol import Sample, Sampler
from alignkit.rollout.turns import TurnSampler
from alignkit.sources.ahead import Ahead, Request
from alignkit.sources.base import explained_numerics
from alignkit.sources.budgets import Allocation, alike
from alignkit.sources.bundle_io import pack, sampled_bundle, unpack
from alignkit.sources.crediting import Crediting
from alignkit.sources.dataset import Order
from alignkit.sources.episodes import episode_columns
from alignkit.sources.scoring import (
    Answers,
    FlatScores,
    Samples,
    Scoring,
    mixed_versions,
    rollout_metrics,
    scores_of,
)


@dataclass
class RolloutSource:
    """Samples a rollout every `epochs * minibatches` optimiser
    steps and hands it out bundle by bundle.

    One rollout takes `minibatches * batch_size` prompts over all processes. Which prompts, their
    order and the sampling noise are functions of the seed and the rollout's number, never of the
    number of processes.

    With a `pass_rate`, up to `refills` times as many more prompts are answered until enough of them
    fit. Where fewer are needed, the surplus is left out.
    """

    prompts: Sequence[Any]  # alignkit.data Prompt: ids, text (or messages), uid, columns
    objective: Objective
    pair: PolicyPair
    sampler: Sampler
    scoring: Scoring
    accelerator: Accelerator
    batch_size: int
    completions: int  # for each prompt, where a draw of the plan does not say how many
    seed: int
    micro_batch_tokens: int = 4096

    # A prompt whose mean score is not between these two makes room for another.
    pass_rate: tuple[float, float] | None = None
    refills: int = 3

    # Gives prompts numbers of completions of their own; None: all have `completions`.
    allocation: Allocation | None = None

    # Completions without an end token keep their score, and their tokens are not trained on.
    mask_truncated: bool = False

    # Plays episodes of several turns, where the recipe names an environment or tools.
    turns: TurnSampler | None = None

    # Set where another engine than the trainer's own model samples.
    correction: Correction | None = None

    # Rollouts that are sampled while earlier ones are trained on.
    ahead: int = 0

    # The order of the prompts; None: in permutations of all.
    visits: Order | None = None

    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise DataError(
                "there are 0 prompts to sample from; see the data report above for what was dropped and why"
            )
        if self.batch_size < self.accelerator.num_processes:
            raise DataError(
                f"train.batch_size {self.batch_size} is smaller than the number of processes {self.accelerator.num_processes}"
            )
        self.plan = self.objective.plan
        self.order = self.visits or Order(len(self.prompts), self.seed)
        self.flat_scores = FlatScores()
        self.crediting = Crediting(
            self.objective, self.pair, self.accelerator, self.micro_batch_tokens, self.correction
        )
        self.drawn_once: dict[tuple[int, int], list[Sample]] = {}  # by draw and prompt

        self.drawing = Ahead(self.sampler, self.ahead, self._requests_of) if self.ahead else None

        # The current rollout. A place is a prompt's position in it; rank r has those with
        # place % world == r.
        self.number = -1
        self.bundles: dict[int, list[Bundle]] = {}  # this rank's, by place
        self.places: list[int] = []  # that have a bundle, on all ranks

    def collect(self, step: int, half: int = 0) -> list[Bundle]:
        """This rank's bundles of optimiser step `step`. A new rollout is sampled where the last one
        is used up, and for the half step of an extragradient step.
        """
        steps_per_rollout = self.plan.epochs * self.plan.minibatches
        number = step // steps_per_rollout

        if number != self.number or steps_per_rollout == 1:
            self.number = number
            self.bundles = self._rollout(number, half)
            self.places = sorted(gather_object(list(self.bundles)))
        return self._minibatch(step % steps_per_rollout)

    def _minibatch(self, position: int) -> list[Bundle]:
        """This rank's part of minibatch `position` of the rollout. Each epoch goes through all
        bundles in an order of its own.
        """
        count = self.plan.minibatches
        epoch, index = divmod(position, count)
        order = Order(len(self.places), self.seed + 7919 * (self.number + 1), shuffle=count > 1)

        epoch_start = epoch * len(self.places)
        first = epoch_start + len(self.places) * index // count
        end = epoch_start + len(self.places) * (index + 1) // count
        drawn = [self.places[i] for i in order[first:end]]
        return [bundle for place in drawn for bundle in self.bundles.get(place, [])]

    def _rollout(self, number: int, half: int) -> dict[int, list[Bundle]]:
        """This rank's bundles of a rollout, by place: sampled, scored and credited."""
        size = self.batch_size * self.plan.minibatches
        turns = 1 + (self.refills if self.pass_rate else 0)
        with raise_on_all_ranks(self.accelerator):
            if self.drawing is None:
                self.sampler.sync()

        answers: Answers = []
        bundles: dict[int, list[Bundle]] = {}
        fitting: list[int] = []

        for turn in range(turns):
            # Which prompts a turn takes follows from the rollout's number and the turn alone.
            mine = self._own_places(turn * size, (turn + 1) * size)
            positions = [number * turns * size + place for place in mine]
            with raise_on_all_ranks(self.accelerator):
                turn_answers, turn_bundles = self._answered(positions, 2 * number + half)
            if self.allocation is not None:
                (pilot,) = self._requests(positions, 2 * number + half)
                turn_answers, turn_bundles, budgets = self.allocation.completed(
                    pilot, turn_answers, turn_bundles, self.sampler, self._further, self.accelerator
                )
                self.metrics |= budgets
            answers = [*answers, *turn_answers]
            bundles |= dict(zip(mine, turn_bundles))

            own_fitting = [place for place, own in bundles.items() if own and self._fits(own)]
            fitting = sorted(gather_object(own_fitting))
            if len(fitting) >= size:
                break
        with raise_on_all_ranks(self.accelerator):
            if self.drawing is None:
                self.sampler.rest()

        self.metrics |= self.scoring.metrics
        further = episode_columns(answers, self.turns.tools) if self.turns else None
        self.metrics |= rollout_metrics(
            self.plan, answers, list(bundles.values()), self.accelerator, further
        )
        if self.correction is not None:
            self.metrics |= mixed_versions(answers, self.accelerator)
        self.flat_scores.watch(self.metrics, self.accelerator)
        if self.pass_rate:
            self.metrics["rollout/fitting"] = len(fitting) / (size * (turn + 1))

        # Where no prompt fits, none is better than the first ones.
        chosen_places = set(fitting[:size] or range(size))
        chosen = {place: own for place, own in bundles.items() if own and place in chosen_places}
        credited = iter(self._credited([bundle for own in chosen.values() for bundle in own]))
        result = {place: [next(credited) for _ in own] for place, own in chosen.items()}
        return result if self.allocation is None else alike(result, self.accelerator)

    def _own_places(self, first: int, end: int) -> list[int]:
        """This rank's places in [first, end)."""
        rank = self.accelerator.process_index
        world = self.accelerator.num_processes
        return [place for place in range(first, end) if place % world == rank]

    def _fits(self, bundles: Sequence[Bundle]) -> bool:
        """Whether the prompt is neither too hard nor too easy for the
        policy (Bae et al. 2025, arXiv:2504.03380).
        """
        if self.pass_rate is None:
            return True
        lowest, highest = self.pass_rate
        scores = scores_of(bundles)
        return scores is not None and lowest < float(scores.mean()) < highest

    def _answered(self, positions: Sequence[int], visit: int) -> tuple[Answers, list[list[Bundle]]]:
        """The policy's answers to the prompts at `positions` of the order, and the bundles of each
        prompt with scores or preferences; none where it cannot be used.
        """
        prompts = self._prompts_at(positions)
        if self.turns is not None:
            return self._played(prompts, positions, visit)

        answers: list[list[Sample]] = [[] for _ in prompts]
        opponents: list[list[Sample]] = [[] for _ in prompts]
        draws: list[int] = []  # of each prompt's answers

        requests = self._requests(positions, visit)
        for index, (request, drawn) in enumerate(zip(requests, self._drawn(requests))):
            for row, samples in zip(answers if request.draw.scored else opponents, drawn):
                row.extend(samples)
            draws += [index] * (request.draw.n or 0) if request.draw.scored else []

        rows = {"draw": torch.tensor(draws)} if len(set(draws)) > 1 else {}
        scored = self._scored(prompts, answers, opponents, rows)
        return answers, [[] if bundle is None else [bundle] for bundle in scored]

    def _scored(
        self, prompts: Sequence[Any], answers: Samples, opponents: Samples, rows: dict[str, Tensor]
    ) -> list[Bundle | None]:
        """The bundles of these answers with scores or preferences; None where there are none."""
        bundles = [
            sampled_bundle(prompt, samples, rows, truncated=not self.mask_truncated)
            for prompt, samples in zip(prompts, answers)
        ]
        return self.scoring.score(prompts, bundles, answers, opponents, self._first_step)

    def _further(self, positions: Sequence[int], answers: Samples) -> list[Bundle | None]:
        """For answers beside a pilot's: what a reward reports of itself stays that of the pilot."""
        reported = dict(self.scoring.metrics)
        scored = self._scored(self._prompts_at(positions), answers, [[] for _ in answers], {})
        self.scoring.metrics = reported
        return scored

    @property
    def _first_step(self) -> int:
        """The optimiser step that the current rollout begins with."""
        return self.number * self.plan.epochs * self.plan.minibatches

    def _prompts_at(self, positions: Sequence[int]) -> list[Any]:
        """The prompts at these positions of the order."""
        return [self.prompts[i] for p in positions for i in self.order[p : p + 1]]

    def _played(
        self, prompts: Sequence[Any], positions: Sequence[int], visit: int
    ) -> tuple[Answers, list[list[Bundle]]]:
        """The same for episodes; a process whose own end first takes part in others' forwards."""
        assert self.turns is not None
        (draw,) = self.plan.samples
        counted = replace(draw, n=draw.n or self.completions)
        with explained_numerics(), self.pair.together():
            rows = self.turns.episodes(prompts, counted, step=visit, prompt_ids=positions)
        return rows, self.scoring.score_episodes(prompts, rows, positions, self._first_step)

    def _requests(self, positions: Sequence[int], visit: int) -> list[Request]:
        """What the plan's draws ask for. Every draw of every visit gets noise of its own."""
        prompts = [prompt.ids for prompt in self._prompts_at(positions)]
        usual = self.allocation.config.pilot if self.allocation else self.completions
        counted = [replace(draw, n=draw.n or usual) for draw in self.plan.samples]
        return [
            Request(prompts, draw, visit * len(counted) + index, positions)
            for index, draw in enumerate(counted)
        ]

    def _requests_of(self, number: int) -> list[Request]:
        """What this rank draws in rollout `number`, where none is refilled."""
        size = self.batch_size * self.plan.minibatches
        positions = [number * size + place for place in self._own_places(0, size)]
        return self._requests(positions, 2 * number)

    def _drawn(self, requests: Sequence[Request]) -> list[list[list[Sample]]]:
        """The samples of each request. NumericsError where the policy's log-probs are not finite,
        with what to do about it.
        """
        with explained_numerics():
            if self.drawing is not None:
                drawn = self.drawing.take(self.number)
                per_rollout = self.plan.epochs * self.plan.minibatches
                self.metrics["rollout/lag"] = float(self.drawing.age * per_rollout)
                return drawn
            return [self._now(index, request) for index, request in enumerate(requests)]

    def _now(self, index: int, request: Request) -> list[list[Sample]]:
        """The samples of draw `index`."""
        if request.draw.once:
            return self._kept_samples(request.positions, request.draw, index)
        return self.sampler.sample(
            request.prompts, request.draw, step=request.clock, prompt_ids=request.positions
        )

    def _kept_samples(self, positions: Sequence[int], draw: Draw, index: int) -> list[list[Sample]]:
        """The samples of draw `index` for the prompts at `positions` of the order, drawn where a
        prompt comes up for the first time. Their noise follows from the prompt alone, so that
        another number of processes and a resumed run have the same ones.
        """
        numbers = [i for position in positions for i in self.order[position : position + 1]]
        missing = [i for i in dict.fromkeys(numbers) if (index, i) not in self.drawn_once]
        with self.pair.together():  # a process that misses none takes part in the others' forwards
            if missing:
                ids = [self.prompts[i].ids for i in missing]
                drawn = self.sampler.sample(ids, draw, step=-1 - index, prompt_ids=missing)
                self.drawn_once |= {(index, i): samples for i, samples in zip(missing, drawn)}
        return [self.drawn_once[index, i] for i in numbers]

    def _credited(self, bundles: Sequence[Bundle]) -> list[Bundle]:
        """The bundles with anchors (and, for rollouts, advantages) in their tokens."""
        lagging = bool(self.metrics.get("rollout/lag"))
        credited = self.crediting.credited(bundles, lagging=lagging)
        self.metrics |= self.crediting.metrics
        return credited

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Every rank's part of the current rollout, and the objective's state. The position in the
        rollout follows from the step.
        """
        own = [(place, bundle) for place, row in self.bundles.items() for bundle in row]
        tensors, shapes = pack(gather_object([bundle for _, bundle in own]))
        credit = {f"credit.{name}": value for name, value in self.crediting.state.items()}
        state = {
            "number": self.number,
            "bundles": shapes,
            "places": gather_object([place for place, _ in own]),
        }
        coming: dict[str, Tensor] = {}
        if self.drawing is not None:
            coming, state["ahead"] = self.drawing.state()
        return {**tensors, **credit, **coming}, state

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Put back what `state` returned, for any number of processes."""
        self.number = state["number"]
        self.places = sorted(set(state["places"]))

        own = set(self._own_places(0, max(self.places, default=-1) + 1))
        self.bundles = {}
        for place, bundle in zip(state["places"], unpack(tensors, state["bundles"])):
            if place in own:
                self.bundles.setdefault(place, []).append(bundle)
        self.crediting.state = {
            name.removeprefix("credit."): value.to(self.pair.device)
            for name, value in tensors.items()
            if name.startswith("credit.")
        }
        if self.drawing is not None:
            self.drawing.load_state(tensors, state["ahead"])
