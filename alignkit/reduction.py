"""The one place where losses are reduced: each term's sum over the optimiser step, divided by its global count.

The step's bundles are known before the first forward, so its counts (rows, tokens) are too; they are all-reduced once.
Micro-batches, accumulation and the number of processes then change memory and speed, never the gradient.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import pad

from alignkit.batches import FAMILIES, Bundle, LossTerms, TokenLogps
from alignkit.errors import NumericsError
from alignkit.objectives.base import Objective
from alignkit.policies.layout import micro_batches
from alignkit.policies.pair import PolicyPair

Metrics = dict[str, float]


@dataclass
class Sums:
    """Running sums of one step on this rank: terms already divided by their counts, metrics with their element counts."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)  # name -> [sum, elements], float64
    broken: list[tuple[str, Tensor, Sequence[Bundle]]] = field(default_factory=list)  # what to look into if the step breaks

    def add(self, out: LossTerms, bundles: Sequence[Bundle], counted: bool) -> None:
        for name, values in out.metrics.items():
            entry = torch.stack([values.double().sum(), values.new_tensor(values.numel(), dtype=torch.float64)])
            previous = self.metrics.get(name, torch.zeros_like(entry))
            self.metrics[name] = previous + entry if counted else previous
        if counted:
            self.broken += [(term.name, term.values.detach(), bundles) for term in out.terms]


class Reducer:
    """Gradients and metrics of whole optimiser steps for one objective and policy pair."""

    def __init__(
        self, objective: Objective, pair: PolicyPair, accelerator: Accelerator, micro_batch_tokens: int, clip: float = 0.0
    ):
        self.objective, self.pair, self.accelerator = objective, pair, accelerator
        self.plan, self.family = objective.plan, FAMILIES[objective.plan.data]
        self.budget, self.clip = micro_batch_tokens, clip
        self.tokens = 0  # computed so far on this rank

    def backward(self, bundles: Sequence[Bundle]) -> Metrics:
        """Leave the step's clipped gradient in the parameters; its metrics. NumericsError on all ranks if it broke."""
        counts = self._counts(bundles)
        chunks = self._chunks(bundles)
        sums = Sums(torch.zeros((), device=self.pair.device, dtype=torch.float64))
        leaves = self._coupled(chunks, counts, sums) if self.plan.coupled else None
        for i, (chunk, counted) in enumerate(chunks):
            last = i == len(chunks) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.pair.module):
                tokens = self.pair.logps(chunk, self.plan, anchors=counted)
                if not counted:  # another rank has more micro-batches: take part in the synchronisation with a zero
                    loss = tokens.policy.sum() * 0
                elif leaves is not None:
                    loss = _pull_back(tokens, leaves[i])
                else:
                    loss = self._loss(chunk, tokens, counts, sums)
                self.accelerator.backward(loss * self.accelerator.num_processes)
            self.tokens += sum(b.n_tokens for b in chunk) if counted else 0
        norm = self._clip()
        metrics = self._reduce(sums)
        self._guard(metrics["loss"], norm, sums)
        return {**metrics, "grad_norm": norm}

    @torch.no_grad()
    def evaluate(self, bundles: Sequence[Bundle]) -> Metrics:
        """Loss and metrics of `bundles` (this rank's share), without a gradient."""
        counts, chunks = self._counts(bundles), self._chunks(bundles)
        sums = Sums(torch.zeros((), device=self.pair.device, dtype=torch.float64))
        if self.plan.coupled:
            self._coupled(chunks, counts, sums)
        else:
            for chunk, counted in chunks:
                tokens = self.pair.logps(chunk, self.plan, anchors=counted)
                if counted:
                    self._loss(chunk, tokens, counts, sums)
        return self._reduce(sums)

    def _loss(self, chunk: Sequence[Bundle], tokens: TokenLogps, counts: dict[str, float], sums: Sums) -> Tensor:
        out = self.objective.loss(self.family.build(chunk, tokens))
        sums.add(out, chunk, counted=True)
        loss = sum(term.weight * term.values.sum() / counts[term.unit] for term in out.terms)
        sums.loss += loss.detach().double()
        return loss

    def _counts(self, bundles: Sequence[Bundle]) -> dict[str, float]:
        local = self.family.counts(bundles)
        total = self.accelerator.reduce(torch.tensor([float(v) for v in local.values()], device=self.pair.device))
        return {name: max(value, 1.0) for name, value in zip(local, total.tolist())}

    def _chunks(self, bundles: Sequence[Bundle]) -> list[tuple[list[Bundle], bool]]:
        """Micro-batches of this rank, as many as the rank with most has; (chunk, False) is a stand-in that counts nothing."""
        chunks = [([bundles[i] for i in part], True) for part in micro_batches(bundles, self.budget, self.pair.layout)]
        most = int(self.accelerator.gather(torch.tensor([len(chunks)], device=self.pair.device)).max())
        stand_in = Bundle(torch.zeros(1, dtype=torch.long), [torch.zeros(1, dtype=torch.long)], [torch.ones(1, dtype=torch.bool)])
        return chunks + [([stand_in], False)] * (most - len(chunks))

    def _coupled(self, chunks: list[tuple[list[Bundle], bool]], counts: dict[str, float], sums: Sums) -> list[TokenLogps]:
        """The loss of the whole step over all ranks on leaf log-probs; per micro-batch, its gradient with respect to them."""
        with torch.no_grad():
            parts = [self.pair.logps(chunk, self.plan, anchors=counted) for chunk, counted in chunks]
        kept = [part for part, (_, counted) in zip(parts, chunks) if counted]
        light = [replace(b, prompt=b.prompt[:1], tokens={}) for chunk, counted in chunks if counted for b in chunk]
        mine = concat(kept)
        everyone, offset = gather_rows(mine, self.accelerator)
        everyone = replace(
            everyone,
            policy=everyone.policy.requires_grad_(),
            extras={k: v.requires_grad_() for k, v in everyone.extras.items()},
        )
        with torch.enable_grad():
            out = self.objective.loss(self.family.build(gather_object(light), everyone))
            loss = sum(term.weight * term.values.sum() / counts[term.unit] for term in out.terms)
        sums.add(out, light, counted=self.accelerator.is_main_process)
        sums.loss += loss.detach().double() / self.accelerator.num_processes
        inputs = {"policy": everyone.policy, **everyone.extras}
        found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        grads = {k: torch.zeros_like(v) if g is None else g for (k, v), g in zip(inputs.items(), found)}
        result = []
        for part, (_, counted) in zip(parts, chunks):
            rows, length = part.policy.shape
            window = {k: g[offset : offset + rows, :length] for k, g in grads.items()}
            result.append(replace(part, policy=window.pop("policy"), extras=window))
            offset += rows if counted else 0
        return result

    def _clip(self) -> float:
        parameters = list(self.pair.parameters())
        return float(self.accelerator.clip_grad_norm_(parameters, self.clip or float("inf")))

    def _reduce(self, sums: Sums) -> Metrics:
        names = sorted(sums.metrics)
        flat = torch.cat([sums.loss.reshape(1), *(sums.metrics[n] for n in names)])
        loss, *rest = self.accelerator.reduce(flat).tolist()
        return {"loss": loss, **{n: rest[2 * i] / rest[2 * i + 1] for i, n in enumerate(names) if rest[2 * i + 1]}}

    def _guard(self, loss: float, norm: float, sums: Sums) -> None:
        """Both figures are global, so every rank comes to the same verdict and stops in the same step."""
        if all(map(_finite, (loss, norm))):
            return
        found = [line for name, values, bundles in sums.broken for line in _name_rows(name, values, bundles)]
        where = "; ".join(found[:8]) or "no row's own loss is broken: the gradient overflowed, or another rank's rows did"
        raise NumericsError(
            f"loss {loss}, gradient norm {norm}: {where}. Nothing was updated; lower train.learning_rate, "
            "check these rows, or go on from the last checkpoint with --resume auto"
        )


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _name_rows(name: str, values: Tensor, bundles: Sequence[Bundle]) -> list[str]:
    """Which rows of a term are not finite, by uid where rows and bundles correspond."""
    bad = (~values.isfinite()).reshape(values.shape[0], -1).any(-1).nonzero()[:, 0].tolist() if values.dim() else []
    per = max(1, values.shape[0] // max(1, len(bundles))) if values.dim() else 1
    return [f"term `{name}` is not finite at row {bundles[min(i // per, len(bundles) - 1)].uid or i}" for i in bad]


def gather_rows(mine: TokenLogps, accelerator: Accelerator) -> tuple[TokenLogps, int]:
    """Every rank's rows, rank by rank, and where this rank's rows begin."""
    if accelerator.num_processes == 1:
        return mine, 0
    device = mine.policy.device
    sizes = accelerator.gather(torch.tensor([mine.policy.shape], device=device))  # [world, 2]
    rows, length = sizes.max(0).values.tolist()
    padded = mine.map(lambda t: pad(t, (0, length - t.shape[1], 0, rows - t.shape[0])))
    keep = torch.cat([torch.arange(rows) < n for n in sizes[:, 0].cpu()]).nonzero()[:, 0].to(device)
    everyone = padded.map(lambda t: accelerator.gather(t.contiguous())[keep])
    return everyone, int(sizes[: accelerator.process_index, 0].sum())


def concat(parts: Sequence[TokenLogps]) -> TokenLogps:
    """Rows of several batches under one another, padded to the longest."""
    length = max(part.policy.shape[1] for part in parts)
    same = [part.map(lambda t: pad(t, (0, length - t.shape[1]))) for part in parts]
    first = same[0]
    return TokenLogps(
        torch.cat([p.policy for p in same]),
        {k: torch.cat([p.anchors[k] for p in same]) for k in first.anchors},
        torch.cat([p.mask for p in same]),
        None if first.behavior is None else torch.cat([p.behavior for p in same]),
        {k: torch.cat([p.extras[k] for p in same]) for k in first.extras},
    )


def _pull_back(tokens: TokenLogps, gradient: TokenLogps) -> Tensor:
    """A scalar whose gradient is the coupled loss's gradient with respect to this micro-batch's log-probs."""
    total = (tokens.policy * gradient.policy).sum()
    for name, value in gradient.extras.items():
        if tokens.extras[name].requires_grad:
            total = total + (tokens.extras[name] * value).sum()
    return total
