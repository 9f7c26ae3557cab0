"""Rollouts: prompts are sampled from, scored or judged, credited, and become the bundles of the
next optimiser steps.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from alignkit.batches import Bundle, Draw, RolloutBatch, TokenLogps
from alignkit.distributed.errors import raise_on_all_ranks
from alignkit.distributed.gather import concat, gather_rows
from alignkit.errors import DataError, NumericsError
from alignkit.judges.rows import INVALID, Compare, judged
from alignkit.objectives.base import Objective
from alignkit.policies.layout import stand_in
from alignkit.policies.pair import PolicyPair
from alignkit.rewards.call import RewardCall, call_reward
from alignkit.rollout.importance import Correction, mismatch
from alignkit.rollout.protocol import Sample, Sampler
from alignkit.sources.bundle_io import pack, unpack
from alignkit.sources.dataset import Order

# rollouts in a row without any difference between the scores of a prompt, until it is said
FLAT_LIMIT = 5
log = logging.getLogger("alignkit")


@dataclass
class RolloutSource:
    """Samples a rollout every `epochs * minibatches` optimiser steps and hands it out bundle by
    bundle.

    One rollout takes `minibatches * batch_size` prompts over all processes. Which prompts, their
    order and the sampling noise are functions of the seed and the rollout's number, never of the
    number of processes. With a `pass_rate` up to `refills` times as many more are answered, until
    enough fit; a rollout that needs fewer leaves the rest of its share out.
    """

    prompts: Sequence[Any]  # alignkit.data Prompt: ids, text (or messages), uid, columns
    objective: Objective
    pair: PolicyPair
    sampler: Sampler
    decode: Callable[[Any, Tensor], Any]  # (prompt, ids) -> what rewards and judges read
    accelerator: Accelerator
    batch_size: int
    completions: int
    seed: int
    reward: RewardCall | None = None
    judge: Compare | None = None
    micro_batch_tokens: int = 4096
    # prompts whose mean score is outside make room for others
    pass_rate: tuple[float, float] | None = None
    refills: int = 3
    # where another engine than the trainer's own model samples
    correction: Correction | None = None
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
        self.order = Order(len(self.prompts), self.seed)
        self.credit_state = self.objective.init_state()
        self.bundles: dict[
            int, Bundle
        ] = {}  # this rank's part of the current rollout: place of the prompt in it -> bundle
        self.places: list[int] = []  # that have a bundle, on all ranks
        self.number = -1  # the current rollout's number
        self.flat = 0  # rollouts in a row in which every prompt's completions scored the same

    def collect(self, step: int, half: int = 0) -> list[Bundle]:
        """This rank's bundles of optimiser step `step`; samples anew where the rollout is used up
        (or for a half step).
        """
        per_rollout = self.plan.epochs * self.plan.minibatches
        if step // per_rollout != self.number or per_rollout == 1:
            self.number = step // per_rollout
            self.bundles = self._rollout(self.number, half)
            self.places = sorted(gather_object(list(self.bundles)))
        return self._minibatch(step % per_rollout)

    def _minibatch(self, position: int) -> list[Bundle]:
        """This rank's part of minibatch `position` of the rollout: each epoch goes through all
        bundles in its own order.
        """
        epoch, index = divmod(position, self.plan.minibatches)
        order = Order(
            len(self.places),
            self.seed + 7919 * (self.number + 1),
            shuffle=self.plan.minibatches > 1,
        )
        start = epoch * len(self.places)
        edges = [start + len(self.places) * i // self.plan.minibatches for i in (index, index + 1)]
        drawn = [self.places[i] for i in order[edges[0] : edges[1]]]
        return [self.bundles[place] for place in drawn if place in self.bundles]

    def _rollout(self, number: int, half: int) -> dict[int, Bundle]:
        size = self.batch_size * self.plan.minibatches
        turns = 1 + (self.refills if self.pass_rate else 0)
        rank = self.accelerator.process_index
        world = self.accelerator.num_processes
        with raise_on_all_ranks(self.accelerator):
            self.sampler.sync()
        scored: list[list[Sample]] = []
        answered: dict[int, Bundle | None] = {}
        for turn in range(turns):  # places follow from the number and the turn alone
            mine = [
                place for place in range(turn * size, (turn + 1) * size) if place % world == rank
            ]
            with raise_on_all_ranks(self.accelerator):
                samples, bundles = self._answers(
                    [number * turns * size + place for place in mine], 2 * number + half
                )
            scored = scored + samples
            answered = answered | dict(zip(mine, bundles))
            fitting = sorted(
                gather_object(
                    [place for place, b in answered.items() if b is not None and self._fits(b)]
                )
            )
            if len(fitting) >= size:
                break
        self._describe(scored, list(answered.values()))
        if self.pass_rate:
            self.metrics["rollout/fitting"] = len(fitting) / ((turn + 1) * size)
        # where none fits, no prompt is better than the first
        chosen = set(fitting[:size] or range(size))
        kept = {
            place: bundle
            for place, bundle in answered.items()
            if bundle is not None and place in chosen
        }
        return dict(zip(kept, self._credited(list(kept.values()))))

    def _fits(self, bundle: Bundle) -> bool:
        """Whether the prompt is neither too hard nor too easy for the policy (Bae et al. 2025,
        arXiv:2504.03380).
        """
        return (
            self.pass_rate is None
            or self.pass_rate[0] < float(bundle.rows["score"].mean()) < self.pass_rate[1]
        )

    def _answers(
        self, positions: Sequence[int], visit: int
    ) -> tuple[list[list[Sample]], list[Bundle | None]]:
        """The policy's samples for the prompts at `positions` of the order, and their bundles;
        None: not to be used.
        """
        prompts = [
            self.prompts[i] for position in positions for i in self.order[position : position + 1]
        ]
        scored: list[list[Sample]] = [[] for _ in prompts]
        opponents: list[list[Sample]] = [[] for _ in prompts]
        for d, draw in enumerate(self.plan.samples):
            draw = replace(draw, n=draw.n or self.completions)
            clock = visit * len(self.plan.samples) + d  # distinct noise for every draw
            drawn = self._sampled([p.ids for p in prompts], draw, step=clock, prompt_ids=positions)
            for row, samples in zip(scored if draw.scored else opponents, drawn):
                row.extend(samples)
        bundles = [_bundle(prompt, samples) for prompt, samples in zip(prompts, scored)]
        return scored, self._appraise(prompts, bundles, scored, opponents)

    def _sampled(
        self, prompts: list[Tensor], draw: Draw, *, step: int, prompt_ids: Sequence[int]
    ) -> list[list[Sample]]:
        """The sampler's answer. Where the policy's log-probs are not finite, NumericsError says
        what to do.
        """
        try:
            return self.sampler.sample(prompts, draw, step=step, prompt_ids=prompt_ids)
        except NumericsError as error:
            raise NumericsError(
                f"{error}. The updates before this step went too far: lower train.learning_rate, or go on from an earlier "
                "checkpoint with --resume PATH"
            ) from error

    def _appraise(self, prompts, bundles, scored, opponents) -> list[Bundle | None]:
        """Scores or preferences into the bundles' rows; None for a bundle without a valid verdict."""
        texts = [[self.decode(p, s.ids) for s in samples] for p, samples in zip(prompts, scored)]
        against = [
            [self.decode(p, s.ids) for s in samples] for p, samples in zip(prompts, opponents)
        ]
        if self.plan.feedback == "reward":
            return self._scores(prompts, bundles, scored, texts)
        if self.plan.feedback == "none":
            return list(bundles)
        if self.judge is None:
            raise DataError("this objective needs a judge; set `judge` in the recipe")
        table = self.plan.feedback == "table"
        found = judged(self.judge, [p.text for p in prompts], texts, against, table=table)
        self.metrics |= getattr(self.judge, "metrics", {})
        return [
            None if rows is None else replace(b, rows={**b.rows, **rows})
            for b, rows in zip(bundles, found)
        ]

    def _scores(self, prompts, bundles, scored, texts) -> list[Bundle | None]:
        if self.reward is None:
            raise DataError("this objective needs a reward; set `rewards` in the recipe")
        step = self.number * self.plan.epochs * self.plan.minibatches
        scores = call_reward(
            self.reward,
            prompts,
            texts,
            [[s.ids.tolist() for s in row] for row in scored],
            trainer_state=SimpleNamespace(global_step=step),
        )
        # each function's own mean, set-aside rows, failures
        self.metrics |= getattr(self.reward, "metrics", {})
        result = []
        for bundle, row in zip(bundles, scores):
            # None: the reward does not apply
            keep = [i for i, score in enumerate(row) if score is not None]
            result.append(
                _pick(bundle, keep, torch.tensor([row[i] for i in keep])) if keep else None
            )
        return result

    @torch.no_grad()
    def _credited(self, bundles: list[Bundle]) -> list[Bundle]:
        """Anchors (and, for rollouts, advantages) into the bundles' tokens."""
        chunks = self.pair.micro_batches(bundles, self.micro_batch_tokens)
        order = [i for chunk in chunks for i in chunk]
        ordered = [bundles[i] for i in order]
        tokens = concat(
            [self.pair.logps([bundles[i] for i in chunk], self.plan) for chunk in chunks]
            or [self._no_rows()]
        )
        self.metrics |= mismatch(tokens, self.accelerator)
        channels = dict(tokens.anchors) if not self.plan.statistics else {}
        if self.correction is not None:
            self.correction.check(self.metrics)
            ordered, figures = self.correction.weigh(ordered, tokens, self.accelerator)
            tokens = replace(tokens, behavior=tokens.policy)  # an objective's own ratio starts at 1
            channels["behavior"] = tokens.policy
            self.metrics |= figures
        if self.plan.data == "rollout":
            channels |= self._advantages(ordered, tokens)
        credited = dict(zip(order, _with_channels(ordered, channels)))
        return [credited[i] for i in range(len(bundles))]

    def _no_rows(self) -> TokenLogps:
        """Log-probs of no completion [0, T], in the form that ranks with some have: this one's were
        all dropped.
        """
        nothing = replace(stand_in(), tokens={"behavior": [torch.zeros(1)]})
        return self.pair.logps([nothing], self.plan).map(lambda t: t[:0])

    def _advantages(self, bundles: list[Bundle], tokens: TokenLogps) -> dict[str, Tensor]:
        """The objective's credit of the global rollout; this rank's part of it."""
        everyone, offset = gather_rows(tokens, self.accelerator)
        scores = gather_object([b.rows["score"].tolist() for b in bundles])
        groups = torch.tensor(
            [i for i, row in enumerate(scores) for _ in row], device=self.pair.device
        )
        flat = torch.tensor([v for row in scores for v in row], device=self.pair.device)
        credited, self.credit_state = self.objective.credit(
            RolloutBatch(everyone, flat, groups), self.credit_state
        )
        self.metrics |= {
            f"credit/{k}": float(v) for k, v in self.credit_state.items() if v.numel() == 1
        }
        window = slice(offset, offset + len(tokens.policy))
        found = {
            "advantages": credited.advantages,
            "returns": credited.returns,
            "values": credited.values,
        }
        return {name: value[window] for name, value in found.items() if value is not None}

    def _describe(self, scored: list[list[Sample]], kept: list[Bundle | None]) -> None:
        """Figures of the rollout over all ranks. Where no bundle is left on any of them, that is
        said instead.
        """
        rows = [b.rows["score"].double() for b in kept if b is not None and "score" in b.rows]
        local = {
            "completions/mean_length": [len(s.ids) for row in scored for s in row],
            "completions/clipped_ratio": [not s.ended for row in scored for s in row],
            "rollout/dropped": [b is None for b in kept],
        }
        if self.plan.feedback == "reward":
            local["reward"] = [value for r in rows for value in r.tolist()]
            local["reward_std"] = [float(r.std()) if len(r) > 1 else 0.0 for r in rows]
            local["frac_reward_zero_std"] = [bool((r == r[0]).all()) for r in rows]
        elif self.plan.feedback != "none":
            local["judge/invalid"] = local["rollout/dropped"]
        sums = torch.tensor(
            [[sum(v), len(v)] for v in local.values()], dtype=torch.float64, device=self.pair.device
        )
        totals = dict(zip(local, self.accelerator.reduce(sums).tolist()))
        if totals["rollout/dropped"][0] == totals["rollout/dropped"][1]:
            if self.plan.feedback == "reward":
                raise DataError("no completion of this step has a score; check the reward")
            raise NumericsError(INVALID)
        self.metrics |= {name: total / max(n, 1) for name, (total, n) in totals.items()}
        self._watch_flatness()

    def _watch_flatness(self) -> None:
        """Says when no group's scores differ any more: a group baseline then leaves nothing to
        learn from.
        """
        self.flat = self.flat + 1 if self.metrics.get("frac_reward_zero_std") == 1 else 0
        if self.flat and self.flat % FLAT_LIMIT == 0 and self.accelerator.is_main_process:
            log.warning(
                "in the last %d rollouts every prompt's completions had one and the same score (%.4g on average): scores say "
                "nothing about which completion is better. Check the reward, take other prompts, or raise rollout.completions",
                self.flat,
                self.metrics["reward"],
            )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Every rank's part of the rollout in use and the objective's state; the position in it
        follows from the step.
        """
        tensors, shapes = pack(gather_object(list(self.bundles.values())))
        carried = {f"credit.{k}": v for k, v in self.credit_state.items()}
        state = {
            "number": self.number,
            "bundles": shapes,
            "places": gather_object(list(self.bundles)),
        }
        return {**tensors, **carried}, state

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """The inverse of `state`, for any number of processes."""
        self.number = state["number"]
        self.places = sorted(state["places"])
        rank = self.accelerator.process_index
        world = self.accelerator.num_processes
        everyone = zip(state["places"], unpack(tensors, state["bundles"]))
        self.bundles = {place: bundle for place, bundle in everyone if place % world == rank}
        device = self.pair.device
        self.credit_state = {
            k[7:]: v.to(device) for k, v in tensors.items() if k.startswith("credit.")
        }


def _bundle(prompt: Any, samples: Sequence[Sample]) -> Bundle:
    ids = [s.ids for s in samples]
    masks = [torch.ones(len(i), dtype=torch.bool) for i in ids]
    return Bundle(
        prompt.ids, ids, masks, prompt.uid, tokens={"behavior": [s.logps for s in samples]}
    )


def _pick(bundle: Bundle, keep: Sequence[int], scores: Tensor) -> Bundle:
    """The completions at `keep` with their scores."""
    tokens = {name: [values[i] for i in keep] for name, values in bundle.tokens.items()}
    completions = [bundle.completions[i] for i in keep]
    masks = [bundle.masks[i] for i in keep]
    return replace(
        bundle,
        completions=completions,
        masks=masks,
        tokens=tokens,
        rows={**bundle.rows, "score": scores},
    )


def _with_channels(bundles: Sequence[Bundle], channels: Mapping[str, Tensor]) -> list[Bundle]:
    """Write rows of `channels` [N, T] back into the bundles they belong to."""
    result = []
    at = 0
    for bundle in bundles:
        lengths = [len(ids) for ids in bundle.completions]
        rows = {
            name: [v[at + k, :n].cpu() for k, n in enumerate(lengths)]
            for name, v in channels.items()
        }
        result.append(replace(bundle, tokens={**bundle.tokens, **rows}))
        at += len(lengths)
    return result
