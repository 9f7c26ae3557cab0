"""The one place where losses are reduced: each term's sum over
the optimiser step, divided by its global count.

The step's bundles are known before the first forward, so its counts (rows, tokens) are too; they
are all-reduced once. Micro-batches, accumulation and the number of processes then change memory and
speed, never the gradient.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from alignkit.batches import Bundle, LossTerms, Outputs, TokenLogps, batch_type
from alignkit.distributed.gather import concat, gather_rows
from alignkit.errors import ResourceError
from alignkit.objectives.base import Objective
from alignkit.policies.layout import stand_in
from alignkit.policies.pair import PolicyPair
from alignkit.rollout.importance import weighted
from alignkit.training.guard import Guard

Metrics = dict[str, float]
log = logging.getLogger("alignkit")


@dataclass
class Sums:
    """Running sums of one step on this rank: terms already divided by their counts, metrics with
    their element counts.
    """

    loss: Tensor  # float64
    guard: Guard
    tokens: int = 0  # computed
    metrics: dict[str, Tensor] = field(default_factory=dict)  # name -> [sum, elements], float64

    @classmethod
    def zero(cls, device: torch.device, guard: Guard) -> "Sums":
        return cls(torch.zeros((), device=device, dtype=torch.float64), guard)

    def add(self, out: LossTerms, bundles: Sequence[Bundle], counted: bool = True) -> None:
        for name, values in out.metrics.items():
            entry = torch.stack(
                [values.double().sum(), values.new_tensor(values.numel(), dtype=torch.float64)]
            )
            previous = self.metrics.get(name, torch.zeros_like(entry))
            self.metrics[name] = previous + entry if counted else previous
        if counted:
            self.guard.watch_terms(out, bundles)


@dataclass
class Part:
    """The rows of a step that one objective learns from."""

    counts: dict[str, float]  # over all processes
    chunks: list[tuple[list[Bundle], bool]]  # micro-batches; False: counts nothing
    everywhere: bool  # whether every process has a row
    sums: Sums
    leaves: list[TokenLogps] | None  # of coupled objectives: the loss's gradient


# What is handed the micro-batches of an evaluation.
See = Callable[[Sequence[Bundle], TokenLogps | Outputs], None]


def _forget(chunk: Sequence[Bundle], seen: TokenLogps | Outputs) -> None:
    """Nobody looks at them."""


class Reducer:
    """Gradients and metrics of whole optimiser steps for one objective and policy pair."""

    def __init__(
        self,
        objective: Objective,
        pair: PolicyPair,
        accelerator: Accelerator,
        micro_batch_tokens: int,
        clip: float = 0.0,
    ):
        self.objective = objective
        self.pair = pair
        self.accelerator = accelerator
        self.plan = objective.plan
        self.family = batch_type(objective.plan)
        self.budget = micro_batch_tokens
        self.clip = clip
        self.tokens = 0  # computed so far, over all ranks

    def backward(self, bundles: Sequence[Bundle]) -> Metrics:
        """Leave the step's clipped gradient in the parameters; its metrics.

        BrokenStep on all ranks if the step is not finite on one. Out of memory: one process halves
        its micro-batches, which changes no gradient, and takes the step anew; several processes, or
        micro-batches of one, are a ResourceError.
        """
        while True:
            try:
                return self._backward(bundles)
            except torch.OutOfMemoryError as error:
                self.halve(bundles, error)

    def halve(self, bundles: Sequence[Bundle], error: torch.OutOfMemoryError) -> None:
        """Make micro-batches smaller and forget the step's gradient. ResourceError where `backward`
        says so.
        """
        chunks = self.pair.micro_batches(bundles, self.budget)
        if self.accelerator.num_processes > 1 or len(chunks) == len(bundles):
            raise ResourceError(
                f"out of memory in a micro-batch of at most {max(map(len, chunks))} rows and {self.budget} tokens: lower "
                "train.micro_batch_tokens, set model.gradient_checkpointing=true, lower data.max_length, or train an adapter "
                "(model.adapter.r=16); the first two change no result"
            ) from error

        while len(self.pair.micro_batches(bundles, self.budget)) == len(chunks):
            self.budget //= 2

        log.warning(
            "out of memory: train.micro_batch_tokens is %d from here on; this changes no gradient",
            self.budget,
        )
        for parameter in self.pair.parameters():
            parameter.grad = None

    def _backward(self, bundles: Sequence[Bundle]) -> Metrics:
        part = self.prepare(bundles, Guard(self.pair.device))
        for number in range(len(part.chunks)):
            self.descend(part, number, is_last=number == len(part.chunks) - 1)
        norm = self.clipped()
        metrics, broken, computed = self.reduce(part)
        part.sums.guard.check(metrics["loss"], norm, broken, self.accelerator)
        self.tokens += computed
        return {**metrics, "grad_norm": norm}

    def of(self, name: str) -> "Reducer":
        """The reducer of the held-out rows of that name: of streams each has its own."""
        return self

    def prepare(self, bundles: Sequence[Bundle], guard: Guard) -> Part:
        """The bundles of a step, cut into micro-batches, with the counts of all processes."""
        counts = self._counts(bundles)
        chunks, everywhere = self._chunks(bundles)
        sums = Sums.zero(self.pair.device, guard)
        leaves = self._coupled(chunks, counts, sums) if self.plan.coupled else None
        return Part(counts, chunks, everywhere, sums, leaves)

    def descend(
        self, part: Part, number: int, *, is_last: bool, weight: float = 1.0, whole: bool = False
    ) -> None:
        """Add the gradient of weight * loss of a micro-batch. In the last one of a step the processes
        exchange their gradients; `whole` says that others before it may have used more parameters.
        """
        chunk, counted = part.chunks[number]
        with nullcontext() if is_last else self.accelerator.no_sync(self.pair.module):
            seen = self.pair.forward(chunk, self.plan)
            # another rank has more micro-batches: take part in the synchronisation with a zero
            if not counted:
                loss = _zero(seen)
            elif part.leaves is not None:
                assert isinstance(seen, TokenLogps)  # no coupled objective learns from outputs
                loss = _pull_back(seen, part.leaves[number])
            else:
                loss = self._loss(chunk, seen, part.counts, part.sums)
            if counted:
                loss = loss + self._auxiliary(seen, part.counts, part.sums)
            if whole and is_last:
                loss = loss + _zero(seen)
            self.accelerator.backward(loss * (weight * self.accelerator.num_processes))
        part.sums.tokens += sum(b.n_tokens for b in chunk) if counted else 0

    def clipped(self) -> float:
        """The norm of the step's gradient, which is clipped."""
        parameters = list(self.pair.parameters())
        return float(self.accelerator.clip_grad_norm_(parameters, self.clip or float("inf")))

    def reduce(self, part: Part) -> tuple[Metrics, float, int]:
        """Over all ranks: the step's loss and metrics, the rows that are not finite, the tokens
        computed.
        """
        return self._reduce(part.sums, part.everywhere)

    @torch.no_grad()
    def evaluate(self, bundles: Sequence[Bundle], see: See = _forget) -> Metrics:
        """Loss and metrics of `bundles` (this rank's share), without a gradient. `see` is handed
        each micro-batch with what the model says about it.
        """
        counts = self._counts(bundles)
        chunks, everywhere = self._chunks(bundles)
        sums = Sums.zero(self.pair.device, Guard(self.pair.device))
        if self.plan.coupled:
            self._coupled(chunks, counts, sums, see)
        else:
            for chunk, counted in chunks:
                seen = self.pair.forward(chunk, self.plan)
                if counted:
                    see(chunk, seen)
                    self._loss(chunk, seen, counts, sums)
        return self._reduce(sums, everywhere)[0]

    def _loss(
        self,
        chunk: Sequence[Bundle],
        seen: TokenLogps | Outputs,
        counts: dict[str, float],
        sums: Sums,
    ) -> Tensor:
        if isinstance(seen, Outputs):
            sums.guard.watch_outputs(seen, chunk)
        else:
            sums.guard.watch_logps(seen, chunk)
        out = self.objective.loss(self.family.build(chunk, seen))
        if all("importance" in bundle.rows for bundle in chunk):  # another engine has sampled them
            out = weighted(out, chunk)
        sums.add(out, chunk)
        loss = _total(out, counts)
        sums.loss += loss.detach().double()
        return loss

    def _auxiliary(
        self, seen: TokenLogps | Outputs, counts: dict[str, float], sums: Sums
    ) -> Tensor | float:
        """A micro-batch's share of the routers' auxiliary loss, whose mean over the trained tokens
        of the step is added to the loss; 0 for models without one.
        """
        if isinstance(seen, Outputs) or "aux_loss" not in seen.extras:
            return 0.0
        values = seen.extras["aux_loss"][seen.mask]
        sums.add(LossTerms([], {"aux_loss": values.detach()}), [])
        router = self.pair.base.router
        assert router is not None
        share = router.coefficient * values.sum() / counts["trained"]
        sums.loss += share.detach().double()
        return share

    def _counts(self, bundles: Sequence[Bundle]) -> dict[str, float]:
        local = {**self.family.counts(bundles), "trained": sum(b.n_trained for b in bundles)}
        total = self.accelerator.reduce(
            torch.tensor([float(v) for v in local.values()], device=self.pair.device)
        )
        return {name: max(value, 1.0) for name, value in zip(local, total.tolist())}

    def _chunks(self, bundles: Sequence[Bundle]) -> tuple[list[tuple[list[Bundle], bool]], bool]:
        """Micro-batches of this rank, as many as the rank with most
        has, and whether every rank has a row.

        (chunk, False) is a stand-in that counts nothing. It is of the same make as the others'
        bundles: what they have stored is not computed, what they have not is, on all ranks.
        """
        chunks = [
            ([bundles[i] for i in part], True)
            for part in self.pair.micro_batches(bundles, self.budget)
        ]
        sizes = self.accelerator.gather(torch.tensor([len(chunks)], device=self.pair.device))
        most = int(sizes.max())
        everywhere = bool(sizes.min())
        # One number for each token, or several: a stored teacher's most likely tokens.
        stored = [(k, v[0].shape[1:]) for k, v in bundles[0].tokens.items()] if bundles else []
        # a small evaluation or minibatch leaves a rank without rows
        stored = stored if everywhere else gather_object(stored)
        tokens = {name: [torch.zeros(1, *shape)] for name, shape in stored}
        filling = replace(stand_in(), tokens=tokens)
        return chunks + [([filling], False)] * (most - len(chunks)), everywhere

    def _coupled(
        self,
        chunks: list[tuple[list[Bundle], bool]],
        counts: dict[str, float],
        sums: Sums,
        see: See = _forget,
    ) -> list[TokenLogps]:
        """The loss of the whole step over all ranks on leaf log-probs; per micro-batch, its
        gradient with respect to them.
        """
        with torch.no_grad():
            parts = [self.pair.logps(chunk, self.plan) for chunk, _ in chunks]
        counted_parts = [part for part, (_, counted) in zip(parts, chunks) if counted]
        for part, (chunk, _) in zip(counted_parts, chunks):  # what counts nothing comes last
            see(chunk, part)
        light = [
            replace(b, prompt=b.prompt[:1], tokens={})
            for chunk, counted in chunks
            if counted
            for b in chunk
        ]
        mine = concat(counted_parts or [parts[0].map(lambda t: t[:0])])
        sums.guard.watch_logps(mine, light)

        # The loss sees all ranks' log-probs as leaves, which collect its gradient.
        everyone, offset = gather_rows(mine, self.accelerator)
        everyone = replace(
            everyone,
            policy=everyone.policy.requires_grad_(),
            extras={k: v.requires_grad_() for k, v in everyone.extras.items()},
        )
        with torch.enable_grad():
            rows = gather_object(light)
            out = self.objective.loss(self.family.build(rows, everyone))
            loss = _total(out, counts)
        sums.add(out, rows, counted=self.accelerator.is_main_process)
        sums.loss += loss.detach().double() / self.accelerator.num_processes

        inputs = {"policy": everyone.policy, **everyone.extras}
        gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        grads = {
            k: torch.zeros_like(v) if g is None else g
            for (k, v), g in zip(inputs.items(), gradients)
        }

        # Each micro-batch gets its own part of it.
        result = []
        for part, (_, counted) in zip(parts, chunks):
            rows, length = part.policy.shape
            window = {k: g[offset : offset + rows, :length] for k, g in grads.items()}
            result.append(replace(part, policy=window.pop("policy"), extras=window))
            offset += rows if counted else 0
        return result

    def _reduce(self, sums: Sums, everywhere: bool) -> tuple[Metrics, float, int]:
        """Over all ranks: the loss with the metrics, the rows that are
        not finite, the tokens computed.
        """
        for name in (
            () if everywhere else gather_object(list(sums.metrics))
        ):  # a rank without rows has no metric
            sums.metrics.setdefault(name, sums.loss.new_zeros(2))
        names = sorted(sums.metrics)
        own = torch.stack([sums.loss, sums.guard.broken, sums.loss.new_tensor(sums.tokens)])
        flat = torch.cat([own, *(sums.metrics[n] for n in names)])
        loss, broken, tokens, *rest = self.accelerator.reduce(flat).tolist()
        metrics = {n: rest[2 * i] / rest[2 * i + 1] for i, n in enumerate(names) if rest[2 * i + 1]}
        return {"loss": loss, **metrics}, broken, int(tokens)


def _zero(seen: TokenLogps | Outputs) -> Tensor:
    """A loss of 0 that every trained parameter takes part in."""
    tensors = [seen.values] if isinstance(seen, Outputs) else [seen.policy, *seen.extras.values()]
    return torch.stack([t.sum() * 0 for t in tensors if t.requires_grad]).sum()


def _total(out: LossTerms, counts: Mapping[str, float]) -> Tensor:
    """The terms, each divided by the step's global count of its unit, added up."""
    first, *others = (term.weight * term.values.sum() / counts[term.unit] for term in out.terms)
    for other in others:
        first = first + other
    return first


def _pull_back(tokens: TokenLogps, gradient: TokenLogps) -> Tensor:
    """A scalar whose gradient is the coupled loss's gradient with
    respect to this micro-batch's log-probs.
    """
    total = (tokens.policy * gradient.policy).sum()
    for name, value in gradient.extras.items():
        if tokens.extras[name].requires_grad:
            total = total + (tokens.extras[name] * value).sum()
    return total
