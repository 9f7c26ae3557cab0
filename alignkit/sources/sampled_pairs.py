"""Fixed rows, beside which completions of the same prompts are drawn, and judged, anew in every
step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from alignkit.batches import Bundle, Plan
from alignkit.distributed.errors import raise_on_all_ranks
from alignkit.errors import NumericsError
from alignkit.judges.rows import INVALID, Compare, judged
from alignkit.rollout.protocol import Sampler
from alignkit.sources.dataset import DatasetSource


@dataclass
class SamplesBeside:
    """The bundles of `rows` with the plan's samples behind their own completions. The noise follows
    from the row's place in the order, so that samples are the same for any number of processes and
    after a resumption. With a judge, which reads what `decode` makes of the tokens, every
    completion is compared with every other of its row; a row with an invalid verdict is left out.
    """

    rows: DatasetSource
    sampler: Sampler
    plan: Plan
    completions: int  # where a draw does not say how many
    accelerator: Accelerator
    judge: Compare | None = None
    decode: Callable[[Tensor], str] = str
    metrics: dict[str, float] = field(default_factory=dict)

    def collect(self, step: int, half: int = 0) -> list[Bundle]:
        """This rank's bundles of optimiser step `step`."""
        bundles = self.rows.collect(step, half)
        self.metrics = self.rows.metrics
        first = step * self.rows.batch_size + self.rows.rank
        places = range(first, first + len(bundles) * self.rows.world, self.rows.world)
        with raise_on_all_ranks(self.accelerator):
            bundles = self._with_samples(bundles, places, 2 * step + half)
            kept = bundles if self.judge is None else self._judged(self.judge, bundles)
        if self.judge is not None:
            counts = torch.tensor([len(kept), len(bundles)], device=self.accelerator.device)
            valid, total = self.accelerator.reduce(counts).tolist()
            if not valid:
                raise NumericsError(INVALID)
            self.metrics = self.metrics | {"judge/invalid": 1 - valid / total}
        return kept

    def _judged(self, judge: Compare, bundles: list[Bundle]) -> list[Bundle]:
        texts = [[self.decode(ids) for ids in b.completions] for b in bundles]
        found = judged(
            judge, [self.decode(b.prompt) for b in bundles], texts, [()] * len(bundles), table=True
        )
        self.metrics = self.metrics | getattr(judge, "metrics", {})
        return [
            replace(b, rows={**b.rows, **rows})
            for b, rows in zip(bundles, found)
            if rows is not None
        ]

    def _with_samples(self, bundles: list[Bundle], places: range, visit: int) -> list[Bundle]:
        for d, draw in enumerate(self.plan.samples):
            clock = visit * len(self.plan.samples) + d  # distinct noise for every draw
            counted = replace(draw, n=draw.n or self.completions)
            drawn = self.sampler.sample(
                [b.prompt for b in bundles], counted, step=clock, prompt_ids=places
            )
            for i, samples in enumerate(drawn):
                ids = [sample.ids for sample in samples]
                masks = [torch.ones(len(row), dtype=torch.bool) for row in ids]
                own = bundles[i]
                bundles[i] = replace(
                    own, completions=[*own.completions, *ids], masks=[*own.masks, *masks], tokens={}
                )
        return bundles

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Nothing: rows and samples are functions of the step and the policy."""
        return self.rows.state()

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Nothing to restore."""
        self.rows.load_state(tensors, state)
