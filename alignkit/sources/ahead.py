"""Rollouts that are sampled while earlier ones are trained on (`rollout.ahead`).

Rollout n + k is drawn with the weights that training on rollout n starts from. So it is k rollouts
old when its turn comes, whatever the timing, and runs repeat bit for bit.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from alignkit.batches import Draw
from alignkit.rollout.protocol import Sample, Sampler

Drawn = list[list[Sample]]  # the samples of each prompt


@dataclass(frozen=True)
class Request:
    """What one draw asks of the sampler."""

    prompts: Sequence[Tensor]
    draw: Draw
    clock: int  # the step of its noise
    positions: Sequence[int]  # of the prompts in the order of all of them


class Ahead:
    """Draws the rollouts of this process in order, in one thread beside the training."""

    def __init__(self, sampler: Sampler, rollouts: int, requests: Callable[[int], list[Request]]):
        self.sampler = sampler
        self.rollouts = rollouts
        self.requests = requests  # of a rollout's number
        self.age = 0  # rollouts since the weights that drew the present one were the policy's
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="alignkit-ahead")
        self._pending: dict[int, Future[list[Drawn]]] = {}
        self._born: dict[
            int, int
        ] = {}  # the rollout that the policy was trained on next, by number

    def take(self, number: int) -> list[Drawn]:
        """What each draw of rollout `number` drew. Those that are to come next are begun, with the
        policy's present weights.
        """
        coming = [n for n in range(number, number + self.rollouts + 1) if n not in self._pending]
        if coming:
            weights = self.sampler.take()
            for n in coming:
                self._born[n] = number
                self._pending[n] = self._thread.submit(self._draw, weights, self.requests(n))

        drawn = self._pending.pop(number).result()
        self.age = number - self._born.pop(number)
        return drawn

    def wait(self) -> None:
        """Return when nothing is being drawn; an error is kept for `take`."""
        for future in self._pending.values():
            future.exception()

    def _draw(self, weights: Any, requests: list[Request]) -> list[Drawn]:
        self.sampler.use(weights)
        return [
            self.sampler.sample(r.prompts, r.draw, step=r.clock, prompt_ids=r.positions)
            for r in requests
        ]

    def state(self) -> tuple[dict[str, Tensor], list[Any]]:
        """All ranks' rollouts that are drawn and not yet trained on: flat tensors, and how they are
        cut again. Every rank has to ask.
        """
        own = []
        for number, future in sorted(self._pending.items()):
            positions = self.requests(number)[0].positions
            for draw, rows in enumerate(future.result()):
                for position, samples in zip(positions, rows, strict=True):
                    own.append((number, self._born[number], draw, position, samples))

        everyone = gather_object(own)
        samples = [sample for *_, row in everyone for sample in row]
        if not samples:
            return {}, []
        tensors = {
            "ahead.ids": torch.cat([sample.ids for sample in samples]),
            "ahead.logps": torch.cat([sample.logps for sample in samples]),
        }
        shapes = [
            [number, born, draw, position, [[len(s.ids), s.ended, s.mixed] for s in row]]
            for number, born, draw, position, row in everyone
        ]
        return tensors, shapes

    def load_state(self, tensors: Mapping[str, Tensor], shapes: Sequence[Any]) -> None:
        """Put back what `state` returned, for any number of processes."""
        self.wait()
        self._pending.clear()
        lengths = [length for *_, row in shapes for length, _, _ in row]
        ids = iter(tensors["ahead.ids"].split(lengths) if shapes else [])
        logps = iter(tensors["ahead.logps"].split(lengths) if shapes else [])

        samples: dict[tuple[int, int, int], list[Sample]] = {}
        for number, born, draw, position, row in shapes:
            self._born[number] = born
            samples[number, draw, position] = [
                Sample(next(ids), next(logps), ended, mixed=mixed) for _, ended, mixed in row
            ]
        for number in dict.fromkeys(number for number, _, _ in samples):
            future: Future[list[Drawn]] = Future()
            future.set_result(
                [
                    [samples[number, draw, position] for position in request.positions]
                    for draw, request in enumerate(self.requests(number))
                ]
            )
            self._pending[number] = future
