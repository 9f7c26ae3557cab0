"""The gradient of a step that learns from several streams: the sum of their weighted losses, each
divided by the counts of its own rows.
"""

from collections.abc import Sequence

import torch

from alignkit.batches import Bundle
from alignkit.sources.streams import StreamSource
from alignkit.training.guard import Guard
from alignkit.training.job import Job
from alignkit.training.reduction import Metrics, Reducer


class StreamReducer:
    """As a `Reducer`, for the bundles of several streams."""

    def __init__(self, job: Job, source: StreamSource):
        self.source = source
        self.accelerator = job.accelerator
        self.reducers = [
            Reducer(
                stream.objective,
                job.pair,
                job.accelerator,
                job.micro_batch_tokens,
                job.config.max_grad_norm,
            )
            for stream in source.streams
        ]
        self.tokens = 0  # computed so far, over all ranks and streams
        self._running = 0  # the stream that is being computed

    def of(self, name: str) -> Reducer:
        """The reducer of the held-out rows of a stream."""
        names = [stream.name for stream in self.source.streams]
        return self.reducers[names.index(name)]

    def backward(self, rows: Sequence[Sequence[Bundle]]) -> Metrics:
        """As `Reducer.backward`, with the metrics of each stream under its name."""
        while True:
            try:
                return self._backward(rows)
            except torch.OutOfMemoryError as error:
                self.reducers[self._running].halve(rows[self._running], error)

    def _backward(self, rows: Sequence[Sequence[Bundle]]) -> Metrics:
        guard = Guard(self.reducers[0].pair.device)
        parts = []
        for self._running, bundles in enumerate(rows):
            parts.append(self.reducers[self._running].prepare(bundles, guard))

        weights = self.source.weights()
        left = sum(len(part.chunks) for part in parts)
        for self._running, part in enumerate(parts):
            reducer = self.reducers[self._running]
            for number in range(len(part.chunks)):
                left -= 1
                reducer.descend(
                    part, number, is_last=not left, weight=weights[self._running], whole=True
                )

        norm = self.reducers[0].clipped()
        results = [reducer.reduce(part) for reducer, part in zip(self.reducers, parts)]
        loss = sum(weight * own["loss"] for weight, (own, _, _) in zip(weights, results))
        guard.check(loss, norm, max(broken for _, broken, _ in results), self.accelerator)
        self.tokens += sum(computed for _, _, computed in results)

        metrics: Metrics = {"loss": loss}
        for stream, weight, (own, _, _) in zip(self.source.streams, weights, results):
            metrics[f"{stream.name}/weight"] = weight
            metrics |= {f"{stream.name}/{metric}": value for metric, value in own.items()}
        return {**metrics, "grad_norm": norm}


def reducer_of(job: Job) -> Reducer | StreamReducer:
    """What makes gradients of the job's bundles."""
    if isinstance(job.source, StreamSource):
        return StreamReducer(job, job.source)
    return Reducer(
        job.objective, job.pair, job.accelerator, job.micro_batch_tokens, job.config.max_grad_norm
    )
