"""Sampling with a transformers model: one prefill per prompt, a plain decode loop over the model's
own cache.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.batches import Draw
from alignkit.errors import ConfigError, ModelError, NumericsError
from alignkit.policies.module import causal_lm, context_length
from alignkit.rollout.kv_cache import RoomyLayer, roomy_cache
from alignkit.rollout.noise import gumbel, row_keys
from alignkit.rollout.packed_weights import PackedWeights
from alignkit.rollout.prompt_cache import BranchingLayer, branching, can_branch
from alignkit.rollout.protocol import Models, Sample, check_request, stop_tokens

# logits that a processor samples from at a time: the work buffers stay in its cache
_CHUNK = 1 << 16
_COMPACT_AT = 0.75  # finished rows leave once this share is left: dropping them copies the cache


class HFSampler:
    """Samples by argmax(log-probs / temperature + Gumbel noise); see `Sampler` for the contract.

    models          a PolicyPair or OneModel max_new_tokens  cap on the tokens of a completion, the
    end token included temperature     divides the logits, after mixing; 0 takes the most likely
    token (its log-probs are those of temperature 1) top_p           nucleus mass; the recorded
    log-probs are those of the renormalised nucleus token_budget    prompt and completion tokens of
    one batch (a single row may exceed it): bounds memory, not results
    """

    def __init__(
        self,
        models: Models,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        token_budget: int = 65536,
    ):
        if max_new_tokens < 1 or not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
            raise ConfigError(
                f"sampling: max_new_tokens {max_new_tokens} (at least 1), temperature {temperature} (at least 0), "
                f"top_p {top_p} (in (0, 1]): one of them is out of its range"
            )
        self.models = models
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.token_budget = token_budget
        self.temperature = temperature
        self.top_p = top_p

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Tensor], draw: Draw, *, step: int, prompt_ids: Sequence[int]
    ) -> list[list[Sample]]:
        """`draw.n` samples for each prompt; see `Sampler.sample`. Raises ConfigError, DataError,
        ModelError, NumericsError.
        """
        n = check_request(prompts, draw, prompt_ids)
        halves = [_Half(self.models, name, weight) for name, weight in _weights(draw)]
        samples: list[list[Sample]] = [[] for _ in prompts]
        # the two of a mixture may be one network with its adapter on and off: each enters for its
        # own forwards alone
        with halves[0].entered() if len(halves) == 1 else nullcontext():
            for batch in self._batches(prompts, n):
                unique = list(dict.fromkeys(prompt for prompt, _ in batch))
                owner = torch.tensor([unique.index(prompt) for prompt, _ in batch])
                ids = torch.tensor([prompt_ids[prompt] for prompt, _ in batch])
                completions = torch.tensor([k for _, k in batch])
                rows = self._decode(
                    halves, [prompts[i] for i in unique], owner, (step, ids, completions)
                )
                for (prompt, _), sample in zip(batch, rows, strict=True):
                    samples[prompt].append(sample)
        return samples

    def sync(self) -> None:
        """Nothing to do: these are the trainer's own weights."""

    def _batches(self, prompts: Sequence[Tensor], n: int) -> Iterator[list[tuple[int, int]]]:
        """(prompt, completion) rows, short prompts first, as many per batch as the token budget
        holds.
        """
        batch: list[tuple[int, int]] = []
        for prompt in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
            # the longest so far: all rows are padded to it
            width = len(prompts[prompt]) + self.max_new_tokens
            for k in range(n):
                if batch and (len(batch) + 1) * width > self.token_budget:
                    yield batch
                    batch = []
                batch.append((prompt, k))
        if batch:
            yield batch

    def _decode(
        self,
        halves: "list[_Half]",
        prompts: list[Tensor],
        owner: Tensor,
        noise: tuple[int, Tensor, Tensor],
    ) -> list[Sample]:
        """One sample per row. `owner` [R]: the prompt a row continues; `noise`: step, prompt ids
        [R], completions [R].
        """
        logits = _mixed([half.prefill(prompts, self.max_new_tokens) for half in halves], halves)
        step, ids, completions = noise
        device = logits.device
        cap = self.max_new_tokens
        rows = len(owner)
        owner = owner.to(device)
        ids = ids.to(device)
        completions = completions.to(device)
        stop = torch.tensor(stop_tokens(self.models), device=device)
        tokens = torch.zeros((rows, cap), dtype=torch.int64, device=device)
        logps = torch.zeros((rows, cap), dtype=torch.float32, device=device)
        lengths = torch.full((rows,), cap, device=device)
        ended = torch.zeros(rows, dtype=torch.bool, device=device)
        live = torch.arange(rows, device=device)
        running = torch.ones(rows, dtype=torch.bool, device=device)
        logits = logits[owner]
        for half in halves:
            half.select(owner)
        for t in range(cap):
            keys = row_keys(self.seed, step, ids[live], completions[live], torch.full_like(live, t))
            chosen, logp = self._choose(logits, keys)
            tokens[live, t] = chosen
            logps[live, t] = logp.float()
            stopped = running & torch.isin(chosen, stop)
            lengths[live[stopped]] = t + 1
            ended[live[stopped]] = True
            running = running & ~stopped
            left = int(running.sum())
            if left == 0 or t + 1 == cap:
                break
            if left <= _COMPACT_AT * len(running):
                kept = running.nonzero()[:, 0]
                live = live[kept]
                chosen = chosen[kept]
                running = running[kept]
                for half in halves:
                    half.select(kept)
            logits = _mixed([half.advance(chosen) for half in halves], halves)
        return _samples(tokens, logps, lengths, ended)

    def _choose(self, logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and their log-probs: logits [R, V], noise keys [R] -> [R], [R]."""
        rows = len(logits) if logits.is_cuda else max(1, _CHUNK // logits.shape[-1])
        parts = [
            self._choose_rows(*part)
            for part in zip(logits.split(rows), keys.split(rows), strict=True)
        ]
        tokens, logps = zip(*parts, strict=True)
        return torch.cat(tokens), torch.cat(logps)

    def _choose_rows(self, logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        if self.temperature not in (0, 1):
            wide = wide / self.temperature
        logprobs = wide.log_softmax(-1)
        if self.top_p < 1:
            ordered, index = logprobs.sort(dim=-1, descending=True)
            # mass before this token
            outside = ordered.exp().cumsum(-1) - ordered.exp() >= self.top_p
            logprobs = logprobs.masked_fill(
                outside.scatter(-1, index, outside), -torch.inf
            ).log_softmax(-1)
        noisy = (
            logprobs if self.temperature == 0 else gumbel(keys, logprobs.shape[-1]).add_(logprobs)
        )
        chosen = noisy.argmax(-1)
        return chosen, logprobs.gather(-1, chosen[:, None])[:, 0]


class _Half:
    """One model of a draw, with its cache. A mixture has two, a plain draw one."""

    products: PackedWeights | None = None
    network: nn.Module | None = None  # the model while it is entered

    def __init__(self, models: Models, name: str, weight: float):
        self.models = models
        self.name = name
        self.weight = weight

    @contextmanager
    def entered(self) -> Iterator[nn.Module]:
        """The model, ready to decode; entering again inside costs nothing."""
        if self.network is not None:
            yield self.network
            return
        with self.models.model(self.name) as model:
            self.products = self.products or PackedWeights(model)
            self.branches = can_branch(causal_lm(model))
            with (
                self.products.used(),
                branching(causal_lm(model)) if self.branches else nullcontext(),
            ):
                self.network = model
                try:
                    yield model
                finally:
                    self.network = None

    def prefill(self, prompts: list[Tensor], new_tokens: int) -> Tensor:
        """Next-token logits [U, V] after each prompt, padded on the left; fills the cache."""
        with self.entered() as model:
            device = next(model.parameters()).device
            width = max(len(prompt) for prompt in prompts)
            _check_context(model, width, new_tokens)
            ids = torch.stack([nn.functional.pad(p, (width - len(p), 0)) for p in prompts]).to(
                device
            )
            lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
            self.mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
            self.cache = roomy_cache(model.config, BranchingLayer if self.branches else RoomyLayer)
            self.arguments = _forward_arguments(model)
            self.next_position = lengths
        return self._forward(ids, (self.mask.cumsum(-1) - 1).clamp(min=0))

    def advance(self, tokens: Tensor) -> Tensor:
        """Next-token logits [R, V] after one more token per row [R]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(tokens), 1))], dim=1)
        logits = self._forward(tokens[:, None], self.next_position[:, None])
        self.next_position = self.next_position + 1
        return logits

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken more than once."""
        self.cache.reorder_cache(rows)
        self.mask = self.mask[rows]
        self.next_position = self.next_position[rows]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        offered = {"position_ids": positions, "logits_to_keep": 1}
        accepted = {name: value for name, value in offered.items() if name in self.arguments}
        with self.entered() as model:
            output = model(
                input_ids=ids,
                attention_mask=self.mask,
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
                **accepted,
            )
        return output.logits[:, -1]


def _weights(draw: Draw) -> list[tuple[str, float]]:
    """The models of a draw with their weights on the logits."""
    if not 0 <= draw.mix <= 1:
        raise ConfigError(f"mixture weight on the reference: {draw.mix} is outside [0, 1]")
    pairs = [(draw.source, 1 - draw.mix), ("reference", draw.mix)]
    return [(name, weight) for name, weight in pairs if weight > 0]


def _mixed(logits: list[Tensor], halves: list[_Half]) -> Tensor:
    """Weighted sum of next-token logits [R, V]; its log-softmax is the token-level mixture (Munos
    et al. 2023, arXiv:2312.00886): the normaliser of each half is constant over the vocabulary and
    cancels.
    """
    if len({part.shape[-1] for part in logits}) > 1:
        sizes = ", ".join(
            f"{half.name} {part.shape[-1]}" for half, part in zip(halves, logits, strict=True)
        )
        raise ModelError(
            f"a mixture needs one vocabulary, got sizes {sizes}; take a reference with the policy's tokenizer"
        )
    if len(halves) == 1:
        return logits[0]
    return torch.stack(
        [half.weight * part.float() for half, part in zip(halves, logits, strict=True)]
    ).sum(0)


def _samples(tokens: Tensor, logps: Tensor, lengths: Tensor, ended: Tensor) -> list[Sample]:
    tokens = tokens.cpu()
    logps = logps.cpu()
    rows = []
    for row, (length, end) in enumerate(zip(lengths.tolist(), ended.tolist(), strict=True)):
        sample = Sample(tokens[row, :length].clone(), logps[row, :length].clone(), end)
        if not bool(torch.isfinite(sample.logps).all()):
            raise NumericsError(
                "sampling: the model's log-probs are not finite; its weights or its logits hold nan or inf"
            )
        rows.append(sample)
    return rows


def _check_context(model: Any, prompt: int, new_tokens: int) -> None:
    limit = context_length(model)
    if prompt + new_tokens > limit:
        raise ConfigError(
            f"a prompt of {prompt} tokens and {new_tokens} new tokens exceed the model's context of {limit}; "
            "lower max_new_tokens (rollout.max_new_tokens of a recipe) or data.max_length"
        )


def _forward_arguments(model: Any) -> set[str]:
    """Names that the innermost model's forward takes (peft's wrapper takes everything and hands it
    on).
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(inner.forward).parameters)
