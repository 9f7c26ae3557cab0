"""A transformers model with its cache, advanced by one token per row and step; and one without."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import LongTensor, Tensor, nn
from transformers.cache_utils import DynamicCache

from alignkit.errors import ConfigError, ModelError
from alignkit.policies.module import causal_lm, context_length
from alignkit.rollout.kv_cache import RoomyLayer, roomy_cache
from alignkit.rollout.packed_weights import PackedWeights
from alignkit.rollout.prompt_cache import BranchingLayer, branching, can_branch
from alignkit.rollout.protocol import Models

# Keys and values [H, L, D] of one row, layer by layer.
KeptRow = Sequence[tuple[Tensor, Tensor]]


class CachedModel:
    """One model of a draw with the cache of its rows: `prefill`, then `select` and `advance`.

    models  where the model is found by its `name`
    weight  of its logits in a mixture
    """

    # filled by `prefill`
    cache: DynamicCache
    mask: Tensor  # [R, tokens so far] int64: 0 at the padding before a prompt
    next_position: Tensor  # [R]: where the next token stands

    def __init__(self, models: Models, name: str, weight: float) -> None:
        self.models = models
        self.name = name
        self.weight = weight
        self.entered_model: nn.Module | None = None
        self.packed_weights: PackedWeights | None = None
        self.branches = False
        self.forward_arguments: set[str] = set()

    @contextmanager
    def entered(self) -> Iterator[nn.Module]:
        """The model, ready to sample; entering again inside costs nothing."""
        if self.entered_model is not None:
            yield self.entered_model
            return

        with self.models.model(self.name) as model:
            inner = causal_lm(model)
            self.branches = can_branch(inner)
            self.forward_arguments = set(inspect.signature(inner.forward).parameters)
            if self.packed_weights is None:
                self.packed_weights = PackedWeights(model)

            with (
                self.packed_weights.used(),
                branching(inner) if self.branches else nullcontext(),
            ):
                self.entered_model = model
                try:
                    yield model
                finally:
                    self.entered_model = None

    def prefill(
        self, prompts: list[Tensor], rooms: Sequence[int], kept: Sequence[KeptRow] = ()
    ) -> Tensor:
        """Next-token logits [P, V] after each of P prompts; fills the cache, one row per prompt.

        `kept` is what was read of the beginning of each prompt, fewer tokens than it has.
        ConfigError where a prompt and its new tokens, `rooms` at most, exceed the model's context.
        """
        read = [layers[0][0].shape[1] for layers in kept] or [0] * len(prompts)
        rest = [prompt[length:] for prompt, length in zip(prompts, read, strict=True)]
        with self.entered() as model:
            _check_context(model, prompts, rooms)
            device = next(model.parameters()).device
            layer = BranchingLayer if self.branches else RoomyLayer
            most = max(read) + max(map(len, rest)) + max(rooms)
            self.cache = roomy_cache(model.config, layer, most)
        if any(read):
            for number, layer_kept in enumerate(zip(*kept, strict=True)):
                cast(RoomyLayer, self.cache.layers[number]).begin(layer_kept)

        # Padding stands on the left, of what was read and of what is read now, so that all rows go
        # on from the same column.
        width = max(len(tokens) for tokens in rest)
        padded = [nn.functional.pad(tokens, (width - len(tokens), 0)) for tokens in rest]
        ids = torch.stack(padded).to(device)
        masks = [_right_aligned(read), _right_aligned([len(tokens) for tokens in rest])]
        self.mask = torch.cat(masks, 1).to(device)
        self.next_position = torch.tensor([len(prompt) for prompt in prompts], device=device)
        return self._forward(ids, (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -width:])

    def advance(self, tokens: Tensor) -> Tensor:
        """Next-token logits [R, V] after one more token per row [R]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(tokens), 1))], dim=1)
        logits = self._forward(tokens[:, None], self.next_position[:, None])
        self.next_position = self.next_position + 1
        return logits

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken more than once."""
        self.cache.reorder_cache(cast(LongTensor, rows))
        self.mask = self.mask[rows]
        self.next_position = self.next_position[rows]

    @property
    def can_keep(self) -> bool:
        """Whether every layer of the cache is one from which `kept` can take rows."""
        return all(isinstance(layer, RoomyLayer) for layer in self.cache.layers)

    def kept(self, row: int, tokens: int) -> KeptRow:
        """A copy of what was read of a row's first `tokens` tokens, for a later `prefill`."""
        columns = self.mask[row].nonzero()[:tokens, 0]
        rows = [cast(RoomyLayer, layer).row(row) for layer in self.cache.layers]
        first, last = columns[[0, -1]].tolist()
        if last - first + 1 != len(columns):
            return [(keys[:, columns], values[:, columns]) for keys, values in rows]

        # Without padding in between it is one block, which is copied faster than its columns.
        block = slice(first, last + 1)
        return [(keys[:, block].clone(), values[:, block].clone()) for keys, values in rows]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [R, V] at the last of the tokens `ids` [R, T], which stand at `positions`."""
        inputs: dict[str, Any] = {
            "attention_mask": self.mask,
            "past_key_values": self.cache,
            **self._accepted(position_ids=positions, logits_to_keep=1),
        }
        # State-space models (Mamba) name their cache otherwise. Their state holds what came before,
        # so that from the second call on there is nothing to mask.
        if "past_key_values" not in self.forward_arguments:
            inputs["cache_params"] = inputs.pop("past_key_values")
            if ids.shape[1] < self.mask.shape[1]:
                del inputs["attention_mask"]

        with self.entered() as model:
            output = model(input_ids=ids, use_cache=True, return_dict=True, **inputs)
        return output.logits[:, -1]

    def _accepted(self, **optional: Any) -> dict[str, Any]:
        """Those of the arguments that the model's forward takes."""
        return {k: value for k, value in optional.items() if k in self.forward_arguments}


class UncachedModel(CachedModel):
    """The same without a cache: every token is computed anew with all before it, as in training.

    For models whose cache is not known or not right.
    """

    rows: list[Tensor]  # the tokens of each row so far

    @property
    def can_keep(self) -> bool:
        """There is no cache to keep."""
        return False

    def prefill(
        self, prompts: list[Tensor], rooms: Sequence[int], kept: Sequence[KeptRow] = ()
    ) -> Tensor:
        """Next-token logits [P, V] after each of P prompts; nothing is kept."""
        with self.entered() as model:
            _check_context(model, prompts, rooms)
            device = next(model.parameters()).device
        self.rows = [prompt.to(device) for prompt in prompts]
        return self._of_rows()

    def advance(self, tokens: Tensor) -> Tensor:
        """Next-token logits [R, V] after one more token per row [R]."""
        self.rows = [torch.cat([row, token[None]]) for row, token in zip(self.rows, tokens)]
        return self._of_rows()

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken more than once."""
        self.rows = [self.rows[row] for row in rows.tolist()]

    def _of_rows(self) -> Tensor:
        # Pads follow the tokens, where nothing sees them.
        ids = nn.utils.rnn.pad_sequence(self.rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in self.rows], device=ids.device)

        # Logits only where some row ends, where the model can leave the others out.
        ends, end_of_row = (lengths - 1).unique(return_inverse=True)
        where_rows_end = self._accepted(logits_to_keep=ends)
        with self.entered() as model:
            output = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                use_cache=False,
                return_dict=True,
                **where_rows_end,
            )
        columns = end_of_row if where_rows_end else lengths - 1
        return output.logits[torch.arange(len(ids), device=ids.device), columns]


def _right_aligned(lengths: Sequence[int]) -> Tensor:
    """int64 [R, longest]: 1 at the last `lengths` [R] columns of each row."""
    width = max(lengths)
    return (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()


def mixed_logits(models: Sequence[CachedModel], logits: Sequence[Tensor]) -> Tensor:
    """Weighted sum of the models' next-token logits [R, V].

    Its log-softmax is the token-level mixture (Munos et al. 2023, arXiv:2312.00886): the normaliser
    of each model is constant over the vocabulary and cancels. ModelError where the vocabularies
    differ in size.
    """
    if len({part.shape[-1] for part in logits}) > 1:
        sizes = ", ".join(
            f"{model.name} {part.shape[-1]}" for model, part in zip(models, logits, strict=True)
        )
        raise ModelError(
            f"a fusion needs one vocabulary, got sizes {sizes}; take models with one tokenizer"
        )

    # Models of weight 0 only read along; one of weight 1 alone is left as it is, to the last bit.
    taking_part = [each for each in zip(models, logits, strict=True) if each[0].weight]
    if len(taking_part) == 1 and taking_part[0][0].weight == 1:
        return taking_part[0][1]
    wide = torch.promote_types(taking_part[0][1].dtype, torch.float32)
    return torch.stack([model.weight * part.to(wide) for model, part in taking_part]).sum(0)


def proposed_logits(
    models: Sequence[CachedModel], logits: Sequence[Tensor], *, top: int, temperature: float
) -> Tensor:
    """Logits [R, V] of the law of tokens that the first model proposes and the second one replaces
    by a sample of its own where they are not among its `top` most likely ones.

    With S the first model's law, T the second's and K its top tokens: S within K plus (1 - S(K)) T.
    Both are laws at `temperature`, by which the result is divided in its turn. Source: Xu et al.
    2025, arXiv:2410.11325. ModelError where the vocabularies differ in size.
    """
    if logits[0].shape[-1] != logits[1].shape[-1]:
        mixed_logits(models, logits)  # says so
    heat = temperature or 1.0
    proposer, judge = ((part.float() / heat).log_softmax(-1) for part in logits)
    best = judge.topk(min(top, judge.shape[-1])).indices
    within = torch.zeros_like(judge, dtype=torch.bool).scatter(-1, best, True)
    replaced = proposer.masked_fill(within, -torch.inf).logsumexp(-1, keepdim=True)
    law = torch.logaddexp(proposer.masked_fill(~within, -torch.inf), replaced + judge)
    return law * heat


def _check_context(model: nn.Module, prompts: Sequence[Tensor], rooms: Sequence[int]) -> None:
    # The last new token is drawn and never read.
    limit = context_length(model)
    lengths = [(len(prompt) + max(room, 1), len(prompt)) for prompt, room in zip(prompts, rooms)]
    total, prompt = max(lengths)
    if total > limit + 1:
        raise ConfigError(
            f"a prompt of {prompt} tokens and {total - prompt} new tokens exceed the model's context "
            f"of {limit}; lower max_new_tokens (rollout.max_new_tokens of a recipe) or "
            "data.max_length"
        )
