"""The language-model head on completion tokens only, in chunks: log-probs, entropies and statistics
without [M, V] logits.

A chunk's logits live while the chunk is computed; backward computes them again. No more than one
chunk [C, V] of each model is alive at a time, unless all of them together are small.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from alignkit.batches import Statistic

# of one [C, V] float32 matrix, a handful of which are alive; on the CPU near its cache's size
CHUNK_BYTES = {"cpu": 8 * 2**20}
CHUNK_BYTES_ELSEWHERE = 64 * 2**20
KEPT_CHUNKS = 4  # up to so many are kept for backward


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens per chunk. At least 64: each chunk also passes over the whole vocabulary matrix and
    its gradient.
    """
    return max(64, CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE) // (4 * vocabulary))


@dataclass(frozen=True)
class Head:
    """A model's own head module with the scale and soft cap its config asks for."""

    module: nn.Module
    scale: float = 1.0
    soft_cap: float | None = None
    # adapters off, where the head has some
    context: Callable[[], AbstractContextManager] = field(default=nullcontext)

    @classmethod
    def of(cls, model: nn.Module) -> "Head":
        """The head of a transformers causal LM, adapters included."""
        config = model.config.get_text_config()
        scale = (
            getattr(config, "logit_scale", None)
            or getattr(config, "lm_head_multiplier", None)
            or 1.0
        )
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return cls(
            model.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None)
        )

    def logprobs(self, hidden: Tensor) -> Tensor:
        """Log-probs of the whole vocabulary, in float32 or wider: [C, H] -> [C, V]."""
        logits = self.module(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return torch.log_softmax(logits, -1, dtype=dtype)


@dataclass(frozen=True)
class AnchorStates:
    """An anchor's hidden states [M, H] at the trained tokens, and its head."""

    hidden: Tensor
    head: Head


@dataclass(frozen=True)
class _Job:
    """What one pass over the tokens computes."""

    head: Head
    labels: Tensor  # [M]
    statistics: Mapping[str, Statistic]
    anchor: AnchorStates | None
    entropy: bool
    rows: int  # tokens per chunk
    keep: bool  # the chunks' graphs for backward, which otherwise computes them again

    @property
    def detached(self) -> list[str]:
        """Names of the figures that carry no gradient."""
        return ["entropy"] * self.entropy + ["anchor"] * (self.anchor is not None)

    def chunk(self, hidden: Tensor, start: int, *, again: bool = False) -> tuple[Tensor, Tensor]:
        """Differentiable figures [1 + S, C] (log-prob, statistics) and detached ones [D, C];
        `again`: the former only.
        """
        part = slice(start, start + self.rows)
        labels = self.labels[part]
        logps = self.head.logprobs(hidden)
        anchor = None
        detached = []
        with torch.no_grad():
            if self.entropy and not again:
                lowest = torch.finfo(logps.dtype).min  # impossible tokens (-inf): 0 log 0 = 0
                detached.append(-torch.linalg.vecdot(logps.exp(), logps.clamp(min=lowest)))
            if self.anchor is not None and (self.statistics or not again):
                with self.anchor.head.context():
                    anchor = self.anchor.head.logprobs(self.anchor.hidden[part])
                detached.append(anchor.gather(-1, labels[:, None])[:, 0].to(logps.dtype))
        figures = [logps.gather(-1, labels[:, None])[:, 0]]
        figures += [statistic(logps, anchor, labels) for statistic in self.statistics.values()]
        return torch.stack(figures), torch.stack(
            detached
        ) if self.detached and not again else logps.new_zeros(0, len(labels))


class _Chunked(torch.autograd.Function):
    """Runs the job chunk by chunk; backward goes through each, recomputed or kept, and sums the
    parameters' gradients.
    """

    @staticmethod
    def forward(ctx, job: _Job, hidden: Tensor, *parameters: nn.Parameter) -> tuple[Tensor, Tensor]:
        ctx.job = job
        ctx.save_for_backward(hidden, *parameters)
        device = hidden.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.kept = []
        parts = []
        for start in range(0, len(hidden), job.rows):
            leaf = hidden[start : start + job.rows].detach().requires_grad_(job.keep)
            with torch.set_grad_enabled(job.keep):
                figures, detached = job.chunk(leaf, start)
            ctx.kept += [(leaf, figures)] * job.keep
            parts.append((figures.detach(), detached))
        figures, detached = (torch.cat(outputs, -1) for outputs in zip(*parts))
        ctx.mark_non_differentiable(detached)
        return figures, detached

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *parameters = ctx.saved_tensors
        device, dtype, enabled = ctx.autocast
        into_hidden = torch.zeros_like(hidden)
        totals: list[Tensor | None] = [None] * len(parameters)
        for start in range(0, len(hidden), ctx.job.rows):
            part = slice(start, start + ctx.job.rows)
            if ctx.kept:
                leaf, figures = ctx.kept.pop(0)
            else:
                leaf = hidden[part].detach().requires_grad_()
                with torch.enable_grad(), torch.autocast(device, dtype, enabled):
                    figures, _ = ctx.job.chunk(leaf, start, again=True)
            grads = torch.autograd.grad(
                figures, [leaf, *parameters], grad[:, part], allow_unused=True
            )
            into_hidden[part] = grads[0]
            for i, new in enumerate(grads[1:]):
                totals[i] = new if totals[i] is None or new is None else totals[i].add_(new)
        return None, into_hidden, *totals


def head_figures(
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    statistics: Mapping[str, Statistic],
    anchor: AnchorStates | None = None,
    *,
    entropy: bool = True,
) -> dict[str, Tensor]:
    """Figures of each token: hidden states [M, H], labels [M] -> {"policy", "entropy", statistics,
    "anchor"}: [M] each.

    "entropy" (nats) carries no gradient: it takes two more passes over a chunk's log-probs, none
    through the model. A statistic gets the anchor's log-probs, or None without one; "anchor" is the
    anchor's log-prob of the label.
    """
    vocabulary = (
        getattr(head.module, "out_features", None) or next(head.module.parameters()).shape[0]
    )
    rows = chunk_rows(vocabulary, hidden.device)
    keep = torch.is_grad_enabled() and not statistics and len(labels) <= KEPT_CHUNKS * rows
    job = _Job(head, labels, statistics, anchor, entropy, rows, keep)
    trained = [p for p in head.module.parameters() if p.requires_grad]
    if len(labels):
        figures, detached = _Chunked.apply(job, hidden, *trained)
    else:  # nothing to train in these rows: empty figures that still depend on every parameter, as DDP wants
        figures = sum((p.sum() for p in trained), hidden.sum()) * hidden.new_zeros(
            1 + len(statistics), 0
        )
        detached = figures.new_zeros(len(job.detached), 0)
    found = dict(zip(("policy", *statistics), figures))
    return found | dict(zip(job.detached, detached))
