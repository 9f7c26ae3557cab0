"""The language-model head, on completion tokens only and in chunks.

Log-probs, entropies and statistics of M tokens over a vocabulary of V would need [M, V] logits,
which are often larger than the model. Here a chunk's logits [C, V] live only while the chunk is
computed, and backward computes them again. One chunk of each model is alive at a time, unless all
chunks of a micro-batch are so few that keeping them is cheaper.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alignkit.batches import Statistic

# Size of one [C, V] float32 matrix, a handful of which are alive; on a CPU near its cache's size.
CHUNK_BYTES = {"cpu": 8 * 2**20}
CHUNK_BYTES_ELSEWHERE = 64 * 2**20
PARTS = {"cpu": 16}  # of a chunk, in which statistics are computed
PARTS_ELSEWHERE = 4  # few, because each one is a dozen launches
SMALLEST_PART = 2**17  # elements, or the calls cost more than the work
PARTITION = "log_partition"  # its name in `TokenLogps.extras`
KEPT_CHUNKS = 4  # a micro-batch of at most so many chunks keeps them for backward


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens per chunk.

    At least 64: each chunk also passes over the whole vocabulary matrix and its gradient.
    """
    return max(64, CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE) // (4 * vocabulary))


@dataclass(frozen=True)
class Head:
    """A model's own head module with the scale and soft cap that its config sets, and the
    temperature of the policy, which divides the logits last.
    """

    module: nn.Module
    scale: float = 1.0
    soft_cap: float | None = None
    temperature: float = 1.0
    # Entered around the module: switches an adapter on the head off where the anchor has none.
    context: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)
    # Only the first so many logits count; None: all. The others pad the embedding.
    vocabulary: int | None = None

    @classmethod
    def of(cls, model: Any) -> "Head":
        """The head of a transformers causal LM, adapters included."""
        config = model.config.get_text_config()

        # Model families name the factor on the logits differently; one of them divides.
        factor = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None)
        divisor = getattr(config, "logits_scaling", None)
        scale = (factor or 1.0) / (divisor or 1.0)
        soft_cap = getattr(config, "final_logit_softcapping", None)
        return cls(model.get_output_embeddings(), scale, soft_cap)

    def logprobs(self, hidden: Tensor) -> Tensor:
        """Log-probs of the whole vocabulary, in float32 or wider: [C, H] -> [C, V]."""
        logits = self.logits(hidden)
        return torch.log_softmax(logits, -1, dtype=_wide(logits))

    def laws(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """As `logprobs`, and the log-partition of the logits that they come from: [C, V], [C]."""
        logits = self.logits(hidden)
        dtype = _wide(logits)
        return torch.log_softmax(logits, -1, dtype=dtype), torch.logsumexp(logits.to(dtype), -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """The final logits, scaled, capped and divided by the temperature: [C, H] -> [C, V]."""
        return self.shaped(self.module(hidden)[..., : self.vocabulary])

    def shaped(self, logits: Tensor) -> Tensor:
        """What the head's module gives, scaled, capped and divided by the temperature: [C, V]."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return logits


def _wide(logits: Tensor) -> torch.dtype:
    """float32, or the logits' dtype where that is wider."""
    return torch.promote_types(logits.dtype, torch.float32)


class AnchorLaws(Protocol):
    """What statistics read of an anchor."""

    def compared(
        self, part: slice, logprobs: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For the tokens `part` of M, the policy's law over the outcomes that both can tell apart
        [C, n], with gradient, the anchor's [C, n], which outcomes the labels are [C], and the
        anchor's log-probs of the labels [C]. `logprobs` [C, V] are the policy's.
        """
        ...


@dataclass(frozen=True)
class AnchorStates:
    """An anchor's hidden states [M, H] at the trained tokens, and its head."""

    hidden: Tensor
    head: Head

    def compared(
        self, part: slice, logprobs: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `AnchorLaws`: the outcomes are the tokens that both models have."""
        with torch.no_grad(), self.head.context():
            theirs = self.head.logprobs(self.hidden[part])
        return cut(logprobs, theirs.shape[-1]), theirs, labels, _at(theirs, labels)


@dataclass(frozen=True)
class _Job:
    """What one pass over the tokens computes.

    Its results are of two kinds: differentiable ones (the log-prob, the plan's statistics and the
    log-partition) and detached ones (the entropy and the anchor's log-prob).
    """

    head: Head
    labels: Tensor  # [M]
    statistics: Mapping[str, Statistic]
    anchor: AnchorLaws | None
    entropy: bool
    partition: bool  # also the log-partition of the policy's logits
    rows: int  # tokens per chunk
    keep: bool  # keep the chunks' graphs for backward, instead of computing them again

    @property
    def detached_names(self) -> list[str]:
        """Names of the results that carry no gradient."""
        return ["entropy"] * self.entropy + ["anchor"] * (self.anchor is not None)

    def chunk(self, hidden: Tensor, start: int, *, again: bool = False) -> tuple[Tensor, Tensor]:
        """Results of the tokens from `start` on, whose hidden states are `hidden` [C, H].

        Returns the differentiable results [1 + S (+ 1), C] (log-prob, statistics, log-partition) and
        the detached ones [D, C]. With `again`, when backward computes the chunk a second time, the latter are empty.
        """
        part = slice(start, start + self.rows)
        labels = self.labels[part]
        if self.partition:
            logps, partition = self.head.laws(hidden)
        else:
            logps = self.head.logprobs(hidden)

        detached = []
        if self.entropy and not again:
            with torch.no_grad():
                # Impossible tokens have log-prob -inf; clamped, they count 0 log 0 = 0.
                lowest = torch.finfo(logps.dtype).min
                detached.append(-torch.linalg.vecdot(logps.exp(), logps.clamp(min=lowest)))

        laws: tuple[Tensor, Tensor | None, Tensor] = (logps, None, labels)
        if self.anchor is not None and (self.statistics or not again):
            ours, theirs, outcomes, anchor_logps = self.anchor.compared(part, logps, labels)
            laws = (ours, theirs, outcomes)
            detached.append(anchor_logps.to(logps.dtype))

        trained = [_at(logps, labels)]
        trained += [_Statistic.apply(s, *laws) for s in self.statistics.values()]  # type: ignore[no-untyped-call]
        if self.partition:
            trained.append(partition)
        if again or not detached:
            return torch.stack(trained), logps.new_zeros(0, len(labels))
        return torch.stack(trained), torch.stack(detached)


def _at(logprobs: Tensor, labels: Tensor) -> Tensor:
    """The log-prob of each label: [C, V], [C] -> [C]."""
    return logprobs.gather(-1, labels[:, None])[:, 0]


def cut(logprobs: Tensor, vocabulary: int | None) -> Tensor:
    """The law of the first `vocabulary` tokens: [C, V] -> [C, n]; None: of all."""
    if vocabulary is None or logprobs.shape[-1] <= vocabulary:
        return logprobs
    return logprobs[:, :vocabulary].log_softmax(-1)


class _Statistic(torch.autograd.Function):
    """A statistic of a chunk's laws, and its gradient, computed some rows at a time.

    A divergence needs up to ten matrices of its laws' size; of a whole chunk they would be more
    memory than all else that the head needs.
    """

    @staticmethod
    def forward(
        ctx: Any, statistic: Statistic, ours: Tensor, theirs: Tensor | None, labels: Tensor
    ) -> Tensor:
        with_grad = ctx.needs_input_grad[1]
        gradient = torch.empty_like(ours) if with_grad else None
        values = []
        parts = PARTS.get(ours.device.type, PARTS_ELSEWHERE)
        size = max(-(-len(labels) // parts), SMALLEST_PART // ours.shape[-1])
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            leaf = ours[part].detach().requires_grad_(with_grad)
            with torch.set_grad_enabled(with_grad):
                value = statistic(leaf, None if theirs is None else theirs[part], labels[part])
                total = value.sum()
            values.append(value.detach())
            if gradient is not None and not total.requires_grad:
                gradient[part] = 0.0  # it reads the anchor alone
            elif gradient is not None:
                (gradient[part],) = torch.autograd.grad(total, [leaf])
        ctx.gradient = gradient
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place, so a second pass would scale it twice: it finds none instead.
        gradient = ctx.gradient
        ctx.gradient = None
        return None, gradient.mul_(grad[:, None]), None, None


class _Chunked(torch.autograd.Function):
    """Runs the job chunk by chunk. Backward goes through each chunk, computed again or kept, and
    sums the gradients of the head's parameters.
    """

    @staticmethod
    def forward(
        ctx: Any, job: _Job, hidden: Tensor, *parameters: nn.Parameter
    ) -> tuple[Tensor, Tensor]:
        ctx.job = job
        ctx.save_for_backward(hidden, *parameters)
        device = hidden.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.kept_chunks = []

        # Each chunk starts from a leaf of its own, so that its graph ends there.
        trained_parts = []
        detached_parts = []
        for start in range(0, len(hidden), job.rows):
            leaf = hidden[start : start + job.rows].detach().requires_grad_(job.keep)
            with torch.set_grad_enabled(job.keep):
                trained, detached = job.chunk(leaf, start)
            if job.keep:
                ctx.kept_chunks.append((leaf, trained))
            trained_parts.append(trained.detach())
            detached_parts.append(detached)

        all_detached = torch.cat(detached_parts, -1)
        ctx.mark_non_differentiable(all_detached)
        return torch.cat(trained_parts, -1), all_detached

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *parameters = ctx.saved_tensors
        device, dtype, enabled = ctx.autocast
        hidden_grad = torch.zeros_like(hidden)
        parameter_grads: list[Tensor | None] = [None] * len(parameters)

        for start in range(0, len(hidden), ctx.job.rows):
            part = slice(start, start + ctx.job.rows)
            if ctx.kept_chunks:
                leaf, trained = ctx.kept_chunks.pop(0)
            else:
                leaf = hidden[part].detach().requires_grad_()
                with torch.enable_grad(), torch.autocast(device, dtype, enabled):
                    trained, _ = ctx.job.chunk(leaf, start, again=True)

            leaf_grad, *new_grads = torch.autograd.grad(
                trained, [leaf, *parameters], grad[:, part], allow_unused=True
            )
            hidden_grad[part] = leaf_grad
            # The first chunk's gradient becomes the sum, the others are added in place.
            for i, new in enumerate(new_grads):
                total = parameter_grads[i]
                parameter_grads[i] = new if total is None or new is None else total.add_(new)
        return None, hidden_grad, *parameter_grads


def head_figures(
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    statistics: Mapping[str, Statistic],
    anchor: AnchorLaws | None = None,
    *,
    entropy: bool = True,
    partition: bool = False,
) -> dict[str, Tensor]:
    """Log-probs, entropies and statistics of M tokens from their hidden states [M, H].

    Returns one tensor [M] per name: "policy" is the log-prob of the label, "entropy" (nats,
    detached) that of the policy at the token, each of `statistics` its value, "anchor" the anchor's
    log-prob of the label, and with `partition` "log_partition" the policy's logsumexp of the logits. Statistics get the anchor's log-probs, or None without one.
    The entropy takes two more passes over a chunk's log-probs, but none through the model.
    """
    vocabulary = getattr(head.module, "out_features", None)
    if vocabulary is None:
        vocabulary = next(head.module.parameters()).shape[0]
    rows = chunk_rows(vocabulary, hidden.device)
    keep = torch.is_grad_enabled() and not statistics and len(labels) <= KEPT_CHUNKS * rows
    job = _Job(head, labels, statistics, anchor, entropy, partition, rows, keep)
    names = ["policy", *statistics, *([PARTITION] if partition else [])]

    parameters = [p for p in head.module.parameters() if p.requires_grad]
    if len(labels):
        trained, detached = _Chunked.apply(job, hidden, *parameters)  # type: ignore[no-untyped-call]
    else:
        # Nothing to train in these rows. The empty results still depend on every parameter, because
        # DDP waits for the gradient of each.
        nothing = hidden.new_zeros(len(names), 0)
        trained = sum((p.sum() for p in parameters), hidden.sum()) * nothing
        detached = nothing.new_zeros(len(job.detached_names), 0)

    # Clones, because FSDP2 hooks into what a forward returns and warns of views.
    results = {name: row.clone() for name, row in zip(names, trained)}
    results.update(zip(job.detached_names, detached))
    return results
