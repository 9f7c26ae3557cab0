"""Sampling with a transformers model: each prompt is read once, then a plain loop draws one token
per row and step over the model's own cache.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alignkit.batches import Draw
from alignkit.errors import ConfigError
from alignkit.kl import exact
from alignkit.policies.module import causal_lm
from alignkit.rollout.cache_probe import goes_on, sampling_model
from alignkit.rollout.cached_model import CachedModel, mixed_logits, proposed_logits
from alignkit.rollout.drawn import Drawn
from alignkit.rollout.kept import Keeper, Kept
from alignkit.rollout.noise import gumbel, row_keys
from alignkit.rollout.policy_copy import copied
from alignkit.rollout.protocol import (
    Continuation,
    Models,
    Sample,
    check_request,
    stop_tokens,
)
from alignkit.rollout.sparse import Mirostat
from alignkit.rollout.truncation import StopTexts, Truncation

# Logits that a processor samples from at a time: the work buffers stay in its cache.
_LOGITS_AT_A_TIME = 1 << 17

# Makes one law's logits [R, V] of every model's.
Mix = Callable[[Sequence[CachedModel], Sequence[Tensor]], Tensor]

# Finished rows leave the batch once this share of it is left: removing them copies the cache.
_COMPACT_AT = 0.75


class HFSampler:
    """Samples by argmax(log-probs / temperature + Gumbel noise); see `Sampler` for the contract.

    models          a PolicyPair or OneModel
    max_new_tokens  cap on the tokens of a completion, the end token included
    temperature     divides the logits, after mixing; 0 takes the most likely token (its log-probs
                    are those of temperature 1)
    top_k, top_p, min_p, cost, order
                    see `Truncation`; the recorded log-probs are those of the renormalised law
    surprise        nats per token that `Mirostat` steers towards; None: no cut of its own
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
        cost: float = 0.0,
        order: int = 1,
        surprise: float | None = None,
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
        self.truncated = Truncation(top_k, top_p, min_p, cost, order)
        self.mirostat = None if surprise is None else Mirostat(surprise)
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
        keep: bool = False,
    ) -> list[list[Sample]]:
        """`draw.n` samples for each prompt; see `Sampler.sample`.

        Raises ConfigError, DataError, ModelError, NumericsError.
        """
        n = check_request(prompts, draw, prompt_ids, continued)
        asked = self._asked(prompts, n, prompt_ids, continued)
        with self.models.together():
            return self._samples(prompts, draw, asked, step, keep)

    def _samples(
        self, prompts: Sequence[Tensor], draw: Draw, asked: list["_Asked"], step: int, keep: bool
    ) -> list[list[Sample]]:
        weights = draw.models
        if self.measured:
            weights.setdefault("reference", 0.0)
        drawn_from = [sampling_model(self.models, *each) for each in weights.items()]
        keep = keep and all(goes_on(self.models, model) for model in drawn_from)
        room = self.token_budget if keep else 0  # for the rows that are kept
        samples: list[list[Sample]] = [[] for _ in prompts]
        mix: Mix = mixed_logits
        if draw.top is not None:
            mix = partial(proposed_logits, top=draw.top, temperature=self.temperature)
        mix = partial(_mixed_within, mix, self._vocabulary(weights))

        # One model is entered for the whole call. The two of a mixture may be one network with its
        # adapter on and off: each of them is entered for its own forwards alone.
        with drawn_from[0].entered() if len(drawn_from) == 1 else nullcontext():
            for batch in self._batches(prompts, asked):
                keeper = Keeper([prompts[row.prompt] for row in batch], room)
                rows = self._sample_batch(drawn_from, mix, prompts, batch, step, keeper)
                for row, sample in zip(batch, rows, strict=True):
                    samples[row.prompt].append(sample)
                room = keeper.room
        return samples

    def _vocabulary(self, weights: Mapping[str, float]) -> int | None:
        """How many tokens can be drawn: those of all models. None: all that one model has.

        A teacher has the policy's tokens, but its embedding may be padded to another size.
        """
        if "teacher" not in weights:
            return None
        sizes = []
        for name in {"policy", *weights}:
            with self.models.model(name) as model:
                sizes.append(causal_lm(model).config.get_text_config().vocab_size)
        return min(sizes)

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
        """One row for each sample that is to be drawn, those of short prompts first, and last those
        of which something was kept.
        """
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        if continued is None:
            room = self.max_new_tokens
            return [
                _Asked(i, prompt_ids[i], Continuation(completion, 0, room))
                for i in by_length
                for completion in range(n)
            ]
        by_length.sort(key=lambda i: continued[i].cached is not None)
        return [_Asked(i, prompt_ids[i], continued[i]) for i in by_length]

    def _batches(
        self, prompts: Sequence[Tensor], asked: list["_Asked"]
    ) -> Iterator[list["_Asked"]]:
        """The rows, as many per batch as the token budget holds; those of which something was kept
        are not among others.
        """
        batch: list[_Asked] = []
        for row in asked:
            # the longest so far: all rows are padded to it
            width = len(prompts[row.prompt]) + self.max_new_tokens
            full = (len(batch) + 1) * width > self.token_budget
            if batch and (full or (batch[-1].start.cached is None) != (row.start.cached is None)):
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
        keeper: Keeper,
    ) -> list[Sample]:
        """One sample for each row of the batch. Each prompt is read once, however many of its
        completions the batch has.
        """
        starts = {row.prompt: row.start for row in batch}
        unique = list(starts)
        read = [prompts[i] for i in unique]
        rooms = [start.room for start in starts.values()]
        earlier: list[Kept] = [
            start.cached for start in starts.values() if start.cached is not None
        ]
        logits = [
            model.prefill(read, rooms, [row.of(model.name, ids) for row, ids in zip(earlier, read)])
            for model in drawn_from
        ]
        device = logits[0].device

        owners = [unique.index(row.prompt) for row in batch]
        rows = _Rows(
            step,
            torch.tensor([row.prompt_id for row in batch]).to(device),
            torch.tensor([row.start.completion for row in batch]).to(device),
            torch.tensor([row.start.position for row in batch]).to(device),
            torch.tensor([row.start.room for row in batch]).to(device),
        )
        # Where each prompt has one completion, there is nothing to take, and no cache is copied.
        if owners != list(range(len(unique))):
            owner = torch.tensor(owners).to(device)
            logits = [part[owner] for part in logits]
            for model in drawn_from:
                model.select(owner)
        return self._decode(drawn_from, mix, logits, rows, keeper)

    def _decode(
        self,
        drawn_from: list[CachedModel],
        mix: Mix,
        logits: list[Tensor],
        rows: "_Rows",
        keeper: Keeper,
    ) -> list[Sample]:
        """One sample per row, token by token, from every model's logits [R, V] of the first token
        on.

        The rows that the models still advance are the live ones. A row that has ended stays among
        them, its further tokens unread, until enough rows have ended for removing them to pay.
        """
        first = logits[0]
        cap = int(rows.rooms.max())
        drawn = Drawn(rows.rooms, cap, self.measured)
        stop = torch.tensor(stop_tokens(self.models), device=first.device)
        live = torch.arange(len(first), device=first.device)  # [L] into the R rows
        running = torch.ones_like(live, dtype=torch.bool)  # [L]: has not ended
        bars = None if self.mirostat is None else self.mirostat.first(len(first), first.device)

        for position in range(cap):
            keys = rows.keys(self.seed, live, position)
            mixed = mix(drawn_from, logits)
            if self.mirostat is not None and bars is not None:
                mixed = self.mirostat.cut(mixed, bars[live])
            anchor = _of_reference(drawn_from, logits) if self.measured else None
            tokens, numbers = self._choose(mixed, keys, anchor)
            if self.mirostat is not None and bars is not None:
                bars[live] = self.mirostat.moved(bars[live], numbers["logps"])
            drawn.put(live, position, tokens, numbers)
            ended = torch.isin(tokens, stop) | self.stop.reached(drawn.tokens[live], position)
            stopped = running & ended
            drawn.end(live[stopped], position)

            running = running & ~stopped & (rows.rooms[live] > position + 1)
            left = int(running.sum())
            if left == 0 or left <= _COMPACT_AT * len(running):
                drawn.keep(keeper, drawn_from, live, running)
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
        return drawn.samples(keeper.kept)

    def _choose(
        self, logits: Tensor, keys: Tensor, anchor: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens [R] and numbers about each of them ([R], by the names of `Drawn`): logits [R, V],
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


def _mixed_within(
    mix: Mix, vocabulary: int | None, models: Sequence[CachedModel], logits: Sequence[Tensor]
) -> Tensor:
    """What `mix` makes of the logits of the first `vocabulary` tokens."""
    return mix(models, [part[..., :vocabulary] for part in logits])


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
