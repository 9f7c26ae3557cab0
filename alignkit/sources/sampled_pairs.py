"""Fixed rows with completions that are drawn anew, for the same prompts, in every step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from alignkit.batches import Bundle, Draw, Plan
from alignkit.distributed.errors import raise_on_all_ranks
from alignkit.errors import ConfigError, NumericsError
from alignkit.judges.rows import INVALID, Compare, judged
from alignkit.rollout.noise import row_keys, uniform
from alignkit.rollout.protocol import Sample, Sampler
from alignkit.sources.dataset import DatasetSource

# Stands for completion and position in the noise that chooses rows, which no sampled token has.
NO_COMPLETION = -1


@dataclass
class SampledPairs:
    """The bundles of `rows`, each with the plan's samples behind its own completions, or, for a draw
    with a `share`, in their place in so many of the rows.

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
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(draw.once for draw in self.plan.samples):
            raise ConfigError(
                "the plan draws completions once for each prompt, which fixed rows do not keep; "
                "put them into the rows, or leave `once` out"
            )

    def collect(self, step: int, half: int = 0) -> list[Bundle]:
        """This rank's bundles of optimiser step `step`."""
        own_rows = self.rows.collect(step, half)
        self.metrics = self.rows.metrics

        # Positions of this rank's rows in the order; they name the noise.
        first = step * self.rows.batch_size + self.rows.rank
        positions = range(first, first + len(own_rows) * self.rows.world, self.rows.world)

        with raise_on_all_ranks(self.accelerator):
            bundles = self._with_samples(own_rows, positions, 2 * step + half)
            valid = bundles if self.judge is None else self._judged(self.judge, bundles)
        if self.judge is not None:
            self._count_invalid(len(valid), len(bundles))
        return valid

    def _with_samples(self, bundles: list[Bundle], positions: range, visit: int) -> list[Bundle]:
        for index, draw in enumerate(self.plan.samples):
            counted = replace(draw, n=draw.n or self.completions)
            # Every draw of every visit gets noise of its own.
            clock = visit * len(self.plan.samples) + index
            if draw.share is not None:
                bundles = self._with_replaced(bundles, positions, counted, clock, index)
                continue
            prompts = [bundle.prompt for bundle in bundles]
            drawn = self.sampler.sample(prompts, counted, step=clock, prompt_ids=positions)
            bundles = [_extended(bundle, samples) for bundle, samples in zip(bundles, drawn)]
        return bundles

    def _with_replaced(
        self, bundles: list[Bundle], positions: range, draw: Draw, clock: int, index: int
    ) -> list[Bundle]:
        """The bundles, some of them with samples in the place of their own completions. Row "draw"
        has the draw's index there, and -1 elsewhere.
        """
        if not bundles:
            return []
        coins = row_keys(
            self.rows.order.seed,
            clock,
            torch.tensor(positions),
            *torch.full((2, len(positions)), NO_COMPLETION),
        )
        assert draw.share is not None  # the caller looked
        chosen = (uniform(coins, 1)[:, 0] < draw.share).nonzero()[:, 0].tolist()
        self.metrics = self.metrics | {"rollout/own_share": len(chosen) / len(bundles)}

        result = [
            replace(bundle, rows={**bundle.rows, "draw": torch.full((len(bundle.masks),), -1)})
            for bundle in bundles
        ]
        prompts = [bundles[i].prompt for i in chosen]
        ids = [positions[i] for i in chosen]
        for i, samples in zip(
            chosen, self.sampler.sample(prompts, draw, step=clock, prompt_ids=ids)
        ):
            rows = {"draw": torch.full((len(samples),), index)}
            replaced = replace(bundles[i], completions=[], masks=[], rows=rows)
            result[i] = _extended(replaced, samples)
        return result

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

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Nothing needs saving: rows and samples are functions of the step and the policy."""
        return self.rows.state()

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Nothing to restore."""
        self.rows.load_state(tensors, state)


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
