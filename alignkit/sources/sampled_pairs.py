"""Fixed rows with completions that are drawn anew, for the same prompts, in every step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from alignkit.batches import Adaptive, Bundle, Draw, Plan
from alignkit.distributed.errors import raise_on_all_ranks
from alignkit.errors import ConfigError, NumericsError
from alignkit.judges.rows import INVALID, Compare, judged
from alignkit.rollout.protocol import Sample, Sampler
from alignkit.sources.dataset import DatasetSource
from alignkit.sources.own_answers import FRESH, GIVEN, REPLAYED, OwnAnswers


@dataclass
class SampledPairs:
    """The bundles of `rows`, each with the plan's samples behind its own completions, or, for a draw
    with a `share`, in their place in some of the rows (`OwnAnswers`).

    The noise follows from the row's position in the order: samples are the same for any number of
    processes and after a resumption. With a judge, every completion is compared with every other
    one of its row, and a row with an invalid verdict is left out.
    """

    rows: DatasetSource
    sampler: Sampler
    plan: Plan
    completions: int  # for each prompt, where a draw of the plan does not say how many
    accelerator: Accelerator
    judge: Compare | None = None
    decode: Callable[[Tensor], str] = str  # token ids -> what the judge reads
    steps: int = 1  # of the whole run; asked for by draws that replay
    watched: str = "eval_loss"  # the held-out loss that lets a share grow
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(draw.once for draw in self.plan.samples):
            raise ConfigError(
                "the plan draws completions once for each prompt, which fixed rows do not keep; "
                "put them into the rows, or leave `once` out"
            )
        # By draw: rows that have just got a fresh answer, with their positions in the order.
        self._fresh: dict[int, list[tuple[int, Bundle]]] = {}
        self.own = {
            index: OwnAnswers(
                draw,
                seed=self.rows.order.seed,
                batch_size=self.rows.batch_size,
                steps=self.steps,
            )
            for index, draw in enumerate(self.plan.samples)
            if draw.share is not None
        }

    def collect(self, step: int, half: int = 0) -> list[Bundle]:
        """This rank's bundles of optimiser step `step`."""
        own_rows = self.rows.collect(step, half)
        self.metrics = self.rows.metrics

        with raise_on_all_ranks(self.accelerator):
            bundles = self._with_samples(own_rows, step, half)
            valid = bundles if self.judge is None else self._judged(self.judge, bundles)
        self._keep_fresh()
        if self.judge is not None:
            self._count_invalid(len(valid), len(bundles))
        return valid

    def _positions(self, step: int) -> range:
        """The positions of the step's rows in the order, of all ranks; they name the noise."""
        first = step * self.rows.batch_size
        return range(first, first + self.rows.batch_size)

    @property
    def _mine(self) -> slice:
        """This rank's part of what the step has for each of its rows."""
        return slice(self.rows.rank, None, self.rows.world)

    def _with_samples(self, bundles: list[Bundle], step: int, half: int) -> list[Bundle]:
        positions = self._positions(step)[self._mine]
        for index, draw in enumerate(self.plan.samples):
            counted = replace(draw, n=draw.n or self.completions)
            # Every draw of every visit gets noise of its own.
            clock = (2 * step + half) * len(self.plan.samples) + index
            if index in self.own:
                bundles = self._with_own_answers(bundles, counted, index, step, clock)
                continue
            prompts = [bundle.prompt for bundle in bundles]
            drawn = self.sampler.sample(prompts, counted, step=clock, prompt_ids=positions)
            bundles = [_extended(bundle, samples) for bundle, samples in zip(bundles, drawn)]
        return bundles

    def _with_own_answers(
        self, bundles: list[Bundle], draw: Draw, index: int, step: int, clock: int
    ) -> list[Bundle]:
        """The bundles, some of them with samples in the place of their own completions, and some
        replaced by rows that had such samples earlier. Row "draw" has the draw's index there, and -1
        elsewhere.
        """
        own = self.own[index]
        positions = self._positions(step)
        kinds, places = own.choices(positions, clock, step)
        self.metrics = self.metrics | _shares(own, kinds)

        result = [
            replace(bundle, rows={**bundle.rows, "draw": torch.full((len(bundle.masks),), -1)})
            for bundle in bundles
        ]
        mine = kinds[self._mine]
        for i in (mine == REPLAYED).nonzero()[:, 0].tolist():
            result[i] = own.kept[int(places[self._mine][i])]

        chosen = (mine == FRESH).nonzero()[:, 0].tolist()
        ids = [positions[self._mine][i] for i in chosen]
        prompts = [bundles[i].prompt for i in chosen]
        drawn = self.sampler.sample(prompts, draw, step=clock, prompt_ids=ids)
        rows = {"draw": torch.full((draw.n or 1,), index)}
        for i, samples in zip(chosen, drawn):
            replaced = replace(bundles[i], completions=[], masks=[], rows=rows)
            result[i] = _extended(replaced, samples)
        self._fresh[index] = [(n, result[i]) for n, i in zip(ids, chosen)]
        return result

    def _keep_fresh(self) -> None:
        """Keep the fresh own answers of all ranks where they come back later. Every rank keeps all
        of them, in the order of their rows.
        """
        for index, own in self.own.items():
            if own.draw.adaptive.replay:
                fresh = gather_object(self._fresh.pop(index))
                own.keep([bundle for _, bundle in sorted(fresh, key=lambda entry: entry[0])])

    def _judged(self, judge: Compare, bundles: list[Bundle]) -> list[Bundle]:
        """The bundles with the judge's verdicts in their rows, without those it cannot judge."""
        prompts = [self.decode(bundle.prompt) for bundle in bundles]
        texts = [[self.decode(ids) for ids in bundle.completions] for bundle in bundles]
        verdicts = judged(judge, prompts, texts, [()] * len(bundles), table=True)
        self.metrics = self.metrics | getattr(judge, "metrics", {})

        return [
            replace(bundle, rows={**bundle.rows, **rows})
            for bundle, rows in zip(bundles, verdicts)
            if rows is not None
        ]

    def _count_invalid(self, valid: int, asked: int) -> None:
        """Log the share of invalid rows over all ranks. NumericsError where no row is valid."""
        counts = torch.tensor([valid, asked], device=self.accelerator.device)
        every_valid, every_asked = self.accelerator.reduce(counts).tolist()
        if not every_valid:
            raise NumericsError(INVALID)
        self.metrics = self.metrics | {"judge/invalid": 1 - every_valid / every_asked}

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """The held-out metrics, the same on all ranks: a share of own answers may grow."""
        for own in self.own.values():
            if own.draw.adaptive.growth:
                own.evaluated(metrics[self.watched])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What follows from earlier steps: shares that grow, and own answers that are kept. Rows and
        samples are functions of the step and the policy.
        """
        tensors, state = self.rows.state()
        for index, own in self.own.items():
            if own.draw.adaptive != Adaptive():
                answers, state[f"own.{index}"] = own.state()
                tensors |= {f"own.{index}.{name}": value for name, value in answers.items()}
        return tensors, state

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Put back what `state` returned."""
        self.rows.load_state(tensors, state)
        for index, own in self.own.items():
            prefix = f"own.{index}."
            own_tensors = {k: v for k, v in tensors.items() if k.startswith(prefix)}
            answers = {k.removeprefix(prefix): v for k, v in own_tensors.items()}
            if f"own.{index}" in state:
                own.load_state(answers, state[f"own.{index}"])


def _shares(own: OwnAnswers, kinds: Tensor) -> dict[str, float]:
    """Metrics of a step's choice among rows, over all ranks."""
    metrics = {"rollout/own_share": float((kinds != GIVEN).double().mean())}
    if own.draw.adaptive.replay:
        metrics["rollout/replayed"] = float((kinds == REPLAYED).double().mean())
    if own.draw.adaptive.growth:
        metrics["rollout/wanted_share"] = own.share
    return metrics


def _extended(bundle: Bundle, samples: list[Sample]) -> Bundle:
    """The bundle with `samples` behind its completions.

    Stored anchors do not cover them and are dropped.
    """
    ids = [sample.ids for sample in samples]
    masks = [torch.ones(len(row), dtype=torch.bool) for row in ids]
    return replace(
        bundle,
        completions=[*bundle.completions, *ids],
        masks=[*bundle.masks, *masks],
        tokens={},
    )
