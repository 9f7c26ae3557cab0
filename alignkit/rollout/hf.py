"""Sampling with a transformers model: each prompt is read once, then a plain loop draws one token
per row and step over the model's own cache.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import Draw
from alignkit.errors import ConfigError, NumericsError
from alignkit.kl import exact
from alignkit.rollout.cache_probe import sampling_model
from alignkit.rollout.cached_model import CachedModel, mixed_logits, proposed_logits
from alignkit.rollout.noise import gumbel, row_keys
from alignkit.rollout.policy_copy import copied
from alignkit.rollout.protocol import (
    Continuation,
    Models,
    Sample,
    check_request,
    stop_tokens,
)
from alignkit.rollout.truncation import StopTexts, Truncation

# Logits that a processor samples from at a time: the work buffers stay in its cache.
_LOGITS_AT_A_TIME = 1 << 16

# Makes one law's logits [R, V] of every model's.
Mix = Callable[[Sequence[CachedModel], Sequence[Tensor]], Tensor]

# Finished rows leave the batch once this share of it is left: removing them copies the cache.
_COMPACT_AT = 0.75

# What a sample also has of every token where the sampler measures.
MEASURED = ("kl", "entropy", "reference_logps")


class HFSampler:
    """Samples by argmax(log-probs / temperature + Gumbel noise); see `Sampler` for the contract.

    models          a PolicyPair or OneModel
    max_new_tokens  cap on the tokens of a completion, the end token included
    temperature     divides the logits, after mixing; 0 takes the most likely token (its log-probs
                    are those of temperature 1)
    top_k, top_p, min_p
                    see `Truncation`; the recorded log-probs are those of the renormalised law
    stop            texts that end a completion with the token that completes one of them
    seed            of the noise
    token_budget    prompt and completion tokens of one batch (a single row may exceed it): bounds
                    the memory and does not change the samples
    measured        each `Sample` also has the KL of every step's law to that of the model called
                    "reference", which then reads along
    """

    def __init__(
        self,
        models: Models,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        token_budget: int = 65536,
        measured: bool = False,
    ):
        if max_new_tokens < 1 or not 0 <= temperature < float("inf"):
            raise ConfigError(
                f"sampling: max_new_tokens {max_new_tokens} (at least 1), temperature "
                f"{temperature} (at least 0): one of them is out of its range"
            )
        self.models = models
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.token_budget = token_budget
        self.temperature = temperature
        self.truncated = Truncation(top_k, top_p, min_p)
        self.stop = StopTexts(stop, models.tokenizer)
        self.measured = measured

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Tensor],
        draw: Draw,
        *,
        step: int,
        prompt_ids: Sequence[int],
        continued: Sequence[Continuation] | None = None,
    ) -> list[list[Sample]]:
        """`draw.n` samples for each prompt; see `Sampler.sample`.

        Raises ConfigError, DataError, ModelError, NumericsError.
        """
        n = check_request(prompts, draw, prompt_ids, continued)
        asked = self._asked(prompts, n, prompt_ids, continued)
        with self.models.together():
            return self._samples(prompts, draw, asked, step)

    def _samples(
        self, prompts: Sequence[Tensor], draw: Draw, asked: list["_Asked"], step: int
    ) -> list[list[Sample]]:
        weights = draw.models
        if self.measured:
            weights.setdefault("reference", 0.0)
        drawn_from = [sampling_model(self.models, *each) for each in weights.items()]
        samples: list[list[Sample]] = [[] for _ in prompts]
        mix: Mix = mixed_logits
        if draw.top is not None:
            mix = partial(proposed_logits, top=draw.top, temperature=self.temperature)

        # One model is entered for the whole call. The two of a mixture may be one network with its
        # adapter on and off: each of them is entered for its own forwards alone.
        with drawn_from[0].entered() if len(drawn_from) == 1 else nullcontext():
            for batch in self._batches(prompts, asked):
                rows = self._sample_batch(drawn_from, mix, prompts, batch, step)
                for row, sample in zip(batch, rows, strict=True):
                    samples[row.prompt].append(sample)
        return samples

    def sync(self) -> None:
        """Nothing to do: these are the trainer's own weights."""

    def take(self) -> Any:
        """The policy's weights where a copy of it is drawn from; else there is nothing to take."""
        own = copied(self.models)
        return None if own is None else own.take()

    def use(self, weights: Any) -> None:
        """Draw from the copy with these weights."""
        own = copied(self.models)
        if own is not None:
            own.use(weights)

    def rest(self) -> None:
        """Nothing to do: caches end with each call."""

    def _asked(
        self,
        prompts: Sequence[Tensor],
        n: int,
        prompt_ids: Sequence[int],
        continued: Sequence[Continuation] | None,
    ) -> list["_Asked"]:
        """One row for each sample that is to be drawn, those of short prompts first."""
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        if continued is None:
            room = self.max_new_tokens
            return [
                _Asked(i, prompt_ids[i], Continuation(completion, 0, room))
                for i in by_length
                for completion in range(n)
            ]
        return [_Asked(i, prompt_ids[i], continued[i]) for i in by_length]

    def _batches(
        self, prompts: Sequence[Tensor], asked: list["_Asked"]
    ) -> Iterator[list["_Asked"]]:
        """The rows, as many per batch as the token budget holds."""
        batch: list[_Asked] = []
        for row in asked:
            # the longest so far: all rows are padded to it
            width = len(prompts[row.prompt]) + self.max_new_tokens
            if batch and (len(batch) + 1) * width > self.token_budget:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _sample_batch(
        self,
        drawn_from: list[CachedModel],
        mix: Mix,
        prompts: Sequence[Tensor],
        batch: list["_Asked"],
        step: int,
    ) -> list[Sample]:
        """One sample for each row of the batch. Each prompt is read once, however many of its
        completions the batch has.
        """
        rooms = {row.prompt: row.start.room for row in batch}
        unique = list(rooms)
        read = [prompts[i] for i in unique]
        logits = [model.prefill(read, list(rooms.values())) for model in drawn_from]
        device = logits[0].device

        owner = torch.tensor([unique.index(row.prompt) for row in batch]).to(device)
        rows = _Rows(
            step,
            torch.tensor([row.prompt_id for row in batch]).to(device),
            torch.tensor([row.start.completion for row in batch]).to(device),
            torch.tensor([row.start.position for row in batch]).to(device),
            torch.tensor([row.start.room for row in batch]).to(device),
        )
        for model in drawn_from:
            model.select(owner)
        return self._decode(drawn_from, mix, [part[owner] for part in logits], rows)

    def _decode(
        self, drawn_from: list[CachedModel], mix: Mix, logits: list[Tensor], rows: "_Rows"
    ) -> list[Sample]:
        """One sample per row, token by token, from every model's logits [R, V] of the first token
        on.

        The rows that the models still advance are the live ones. A row that has ended stays among
        them, its further tokens unread, until enough rows have ended for removing them to pay.
        """
        first = logits[0]
        cap = int(rows.rooms.max())
        drawn = _Drawn(rows.rooms, cap, self.measured)
        stop = torch.tensor(stop_tokens(self.models), device=first.device)
        live = torch.arange(len(first), device=first.device)  # [L] into the R rows
        running = torch.ones_like(live, dtype=torch.bool)  # [L]: has not ended

        for position in range(cap):
            keys = rows.keys(self.seed, live, position)
            mixed = mix(drawn_from, logits)
            anchor = _of_reference(drawn_from, logits) if self.measured else None
            tokens, numbers = self._choose(mixed, keys, anchor)
            drawn.put(live, position, tokens, numbers)
            ended = torch.isin(tokens, stop) | self.stop.reached(drawn.tokens[live], position)
            stopped = running & ended
            drawn.end(live[stopped], position)

            running = running & ~stopped & (rows.rooms[live] > position + 1)
            left = int(running.sum())
            if left == 0:
                break

            if left <= _COMPACT_AT * len(running):
                unfinished = running.nonzero()[:, 0]
                live = live[unfinished]
                tokens = tokens[unfinished]
                running = running[unfinished]
                for model in drawn_from:
                    model.select(unfinished)
            logits = [model.advance(tokens) for model in drawn_from]
        return drawn.samples()

    def _choose(
        self, logits: Tensor, keys: Tensor, anchor: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens [R] and numbers about each of them ([R], by the names of `_Drawn`): logits [R, V],
        noise keys [R], and the reference's logits [R, V] where the KL is measured.
        """
        rows = len(logits) if logits.is_cuda else max(1, _LOGITS_AT_A_TIME // logits.shape[-1])
        anchors = [None] * len(logits.split(rows)) if anchor is None else anchor.split(rows)
        parts = [
            self._choose_rows(*part)
            for part in zip(logits.split(rows), keys.split(rows), anchors, strict=True)
        ]
        tokens, numbers = zip(*parts, strict=True)
        return torch.cat(tokens), {
            name: torch.cat([part[name] for part in numbers]) for name in numbers[0]
        }

    def _choose_rows(
        self, logits: Tensor, keys: Tensor, anchor: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        if self.temperature not in (0, 1):
            wide = wide / self.temperature
        logprobs = self.truncated(wide.log_softmax(-1))

        # The Gumbel-max trick: the argmax of log-probs plus Gumbel noise is a sample of them.
        if self.temperature == 0:
            tokens = logprobs.argmax(-1)
        else:
            tokens = gumbel(keys, logprobs.shape[-1]).add_(logprobs).argmax(-1)
        numbers = {"logps": logprobs.gather(-1, tokens[:, None])[:, 0]}
        if anchor is not None:
            numbers |= _of_step(logprobs, anchor, tokens)
        return tokens, numbers


@dataclass(frozen=True)
class _Asked:
    """One sample that is to be drawn."""

    prompt: int  # its place among the prompts of the call
    prompt_id: int
    start: Continuation


@dataclass(frozen=True)
class _Rows:
    """What the noise of R rows depends on, beside the seed and the position; and their room."""

    step: int
    prompt_ids: Tensor  # [R]
    completions: Tensor  # [R]: the number of the completion among its prompt's
    positions: Tensor  # [R]: of the first token
    rooms: Tensor  # [R]: most tokens

    def keys(self, seed: int, live: Tensor, position: int) -> Tensor:
        """Noise keys of the rows `live` [L] at one position: [L]."""
        return row_keys(
            seed,
            self.step,
            self.prompt_ids[live],
            self.completions[live],
            self.positions[live] + position,
        )


class _Drawn:
    """The tokens of R rows as they are drawn, at most `rooms` [R] of each and `cap` of any."""

    def __init__(self, rooms: Tensor, cap: int, measured: bool) -> None:
        device = rooms.device
        shape = (len(rooms), cap)
        self.tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        names = ["logps", *(MEASURED if measured else ())]
        self.numbers = {name: torch.zeros(shape, device=device) for name in names}
        self.lengths = rooms.clone()
        self.ended = torch.zeros(len(rooms), dtype=torch.bool, device=device)

    def put(self, rows: Tensor, position: int, tokens: Tensor, numbers: dict[str, Tensor]) -> None:
        """The tokens [L] of these rows at a position, with numbers about each of them."""
        self.tokens[rows, position] = tokens
        for name, values in numbers.items():
            self.numbers[name][rows, position] = values.float()

    def end(self, rows: Tensor, position: int) -> None:
        """The token at this position is the last of these rows."""
        self.lengths[rows] = position + 1
        self.ended[rows] = True

    def samples(self) -> list[Sample]:
        """One sample per row. NumericsError where log-probs are not finite."""
        tokens = self.tokens.cpu()
        numbers = {name: values.cpu() for name, values in self.numbers.items()}
        ends = zip(self.lengths.tolist(), self.ended.tolist(), strict=True)

        samples = []
        for row, (length, ended) in enumerate(ends):
            own: dict[str, Any] = {
                name: values[row, :length].clone() for name, values in numbers.items()
            }
            sample = Sample(tokens[row, :length].clone(), ended=ended, **own)
            if not bool(torch.isfinite(sample.logps).all()):
                raise NumericsError(
                    "sampling: the model's log-probs are not finite; its weights or its logits "
                    "hold nan or inf"
                )
            samples.append(sample)
        return samples


def _of_reference(models: list[CachedModel], logits: list[Tensor]) -> Tensor:
    """The reference's logits [R, V] among those of every model."""
    return next(part for model, part in zip(models, logits) if model.name == "reference")


def _of_step(logprobs: Tensor, anchor: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """The numbers `MEASURED` of one step: the law that is sampled [R, V] in log-probs, the
    reference's logits [R, V] and the tokens [R] -> [R] each.
    """
    reference = anchor.to(logprobs.dtype).log_softmax(-1)
    return {
        "kl": exact(logprobs, reference),
        "entropy": torch.special.entr(logprobs.exp()).sum(-1),
        "reference_logps": reference.gather(-1, tokens[:, None])[:, 0],
    }
