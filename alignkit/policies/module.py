"""The one module that is trained: backbone, head and value head behind a single forward.

Policy parameters are touched nowhere else, so that DDP and FSDP see every use of them.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from alignkit.batches import Statistic
from alignkit.errors import DataError, ModelError
from alignkit.policies.bins import BIN, BinHead
from alignkit.policies.head import AnchorLaws, Head, head_figures
from alignkit.policies.layout import Rows, attention_mask, build_rows, stand_in
from alignkit.policies.packing import FLEX, packing_of, take_runs
from alignkit.policies.router import Router
from alignkit.policies.run_layers import take_over
from alignkit.policies.tensor_parallel import whole_copy


def causal_lm(model: Any) -> Any:
    """The transformers causal LM inside, without peft's wrapper (the adapters are in its layers)."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def backbone(lm: Any) -> nn.Module:
    """The transformer below a causal LM's head, whose forward gives hidden states. ModelError where
    there is none to be found.
    """
    # Some classes name their backbone `model` and tell transformers another name (Llama 4, Mllama).
    body = lm.base_model if lm.base_model is not lm else getattr(lm, "model", lm)
    if body is lm or not isinstance(body, nn.Module):
        raise ModelError(
            f"model.name_or_path: the layers of {type(lm).__name__} are neither its `base_model` nor "
            "its `model`, where alignkit looks for them; take another model, or report its name"
        )
    return body


def context_length(model: Any) -> int:
    """Tokens that a transformers model reads at once; a very large
    number where its config names no limit.
    """
    text = model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    return int(limit) if limit else 1 << 30


def position_table(model: Any) -> int | None:
    """Positions that a transformers model has an entry for in a table, beyond which it cannot read;
    None for models without one, whose positions are computed (rotary embeddings, ALiBi).
    """
    sizes: list[int | None] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "pos" in name.rsplit(".", 1)[-1].replace(
            "wpe", "pos"
        ):
            # OPT's table begins with two entries of another use, RoBERTa's with the padding's.
            reserved = getattr(module, "offset", (module.padding_idx or -1) + 1)
            sizes.append(module.num_embeddings - reserved)
        rotations = getattr(module, "embed_positions", None)
        if isinstance(rotations, Tensor):  # GPT-J computes its rotations once
            sizes.append(len(rotations))

    # MPT computes its distances once.
    sizes.append(getattr(model.config.get_text_config(), "max_seq_len", None))
    return min((size for size in sizes if size), default=None)


def layer_windows(config: Any) -> dict[str, int | None]:
    """Sliding window per layer type of a model's config; the
    single key "" for a model that takes one mask.

    Chunked attention (Llama 4) is no sliding window, but sees as far back at most.
    """
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    types = getattr(text, "layer_types", None)
    if not types:
        return {"": window}

    # A chunk is no sliding window. Its size makes the probe of the layout long enough to notice.
    limited = {
        "sliding_attention": window,
        "chunked_attention": getattr(text, "attention_chunk_size", None),
    }
    return {name: limited.get(name) for name in dict.fromkeys(types)}


class Tail(nn.Module):
    """What a network computes of hidden states, with the parts that it needs for it: a unit of
    shards, which are put together for this alone. `finish` is the network's own method.
    """

    def __init__(self, finish: Callable[..., dict[str, Any]], parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.finish = finish

    def forward(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """See `PolicyModule.finish`."""
        return self.finish(*arguments, **options)


class PolicyModule(nn.Module):
    """A causal LM (with its adapters) and, where the plan asks for
    it, a value head on its last hidden states.
    """

    model: Any  # the transformers model, maybe in peft's wrapper

    def __init__(
        self, model: Any, *, values: bool = False, rewards: bool = False, bins: int = 0
    ) -> None:
        super().__init__()
        self.model = model
        take_runs(causal_lm(model))
        # Whether its last layer passes over what nothing reads.
        self.trims = take_over(causal_lm(model))
        self.windows = layer_windows(model.config)
        # An anchor's: how much of its vocabulary the policy has too; None: all of it.
        self.vocabulary: int | None = None
        self.positions = position_table(causal_lm(model))
        self.temperature = 1.0  # divides the logits: log-probs are those of samples drawn at it
        self.router: Router | None = None  # set where its auxiliary loss is trained on
        self.tail: Tail | None = None  # where it is spread over processes
        self.value_head: nn.Linear | None = None
        self.rewards = (
            rewards  # whether the values are rewards of whole texts, saved with the model
        )
        self.bin_head: BinHead | None = None
        first = next(model.parameters())
        width = model.config.get_text_config().hidden_size
        # Only what the files hold may be without content for a while.
        device = "cpu" if first.is_meta else first.device
        if bins:
            self.bin_head = BinHead(width, bins, device)
        if values:
            # Values start at 0, so the first advantages are the plain returns. Of rewards only
            # differences are learned, so they have no bias; `start_reward_head` starts them.
            self.value_head = nn.Linear(width, 1, bias=not rewards, device=device)
            for parameter in self.value_head.parameters():
                nn.init.zeros_(parameter)

    @property
    def head(self) -> Head:
        """The model's own head, over the part of its vocabulary that
        counts, at the policy's temperature.
        """
        own = Head.of(causal_lm(self.model))
        return replace(own, vocabulary=self.vocabulary, temperature=self.temperature)

    @property
    def packing(self) -> float | None:
        """See `alignkit.policies.packing.packing_of`."""
        return packing_of(causal_lm(self.model))

    def _run(self, rows: Rows, read: Tensor | None = None, **options: Any) -> Any:
        """What the backbone gives for these rows, with its last hidden states [R, L, H], or [1, S, H]
        at the tokens `read` of a packed row.
        """
        lm = causal_lm(self.model)
        if self.positions is not None and rows.input_ids.shape[1] > self.positions:
            _check_positions(rows, self.positions)

        kernel = lm.config._attn_implementation
        additive = next(lm.parameters()).dtype if kernel == "eager" else None
        mask = attention_mask(
            rows, self.windows, additive=additive, blocks=kernel == FLEX, read=read
        )

        # Position ids are given only where rows branch: models take slower paths with them.
        positions = {"position_ids": rows.position_ids} if rows.branched else {}
        return backbone(lm)(
            input_ids=rows.input_ids, attention_mask=mask, use_cache=False, **positions, **options
        )

    def _read(self, rows: Rows) -> tuple[Tensor | None, Tensor]:
        """The tokens whose last hidden states the head reads [S] (None: all are computed), and where
        each trained token's is among those that are computed [M].
        """
        if not self.trims or not rows.runs or not rows.branched or not len(rows.sources):
            return None, rows.sources
        read, places = torch.unique(rows.sources, return_inverse=True)
        return read, places

    def forward(
        self,
        rows: Rows,
        statistics: Mapping[str, Statistic] | None = None,
        anchor: AnchorLaws | None = None,
        *,
        hidden_only: bool = False,
        entropy: bool = True,
        partition: bool = False,
    ) -> dict[str, Any]:
        """Results of `head_figures` for the trained tokens, "values" where there is a value head,
        and log-probs of the bins where there is a head of bins: [M] each. With a gradient also the router's "aux_loss", the same number at each token.

        `hidden_only` returns {"hidden": [M, H], "head": a Head} instead: an anchor's states for the
        policy's statistics.
        """
        balanced = self.router is not None and torch.is_grad_enabled() and not hidden_only
        read, places = self._read(rows)
        output = self._run(rows, read, **({"output_router_logits": True} if balanced else {}))
        states = output.last_hidden_state.flatten(0, 1)
        if read is not None and len(states) != len(read):
            places = rows.sources  # somebody has given the last layer a forward since
        hidden: Tensor = states[places]
        finish = self.finish if self.tail is None else self.tail
        results = finish(
            hidden,
            rows,
            statistics or {},
            anchor,
            hidden_only=hidden_only,
            entropy=entropy,
            partition=partition,
        )
        if self.router is not None and balanced:
            results["aux_loss"] = self.router.loss(output.router_logits, rows).expand(len(hidden))
        return results

    def finish(
        self,
        hidden: Tensor,
        rows: Rows,
        statistics: Mapping[str, Statistic],
        anchor: AnchorLaws | None,
        *,
        hidden_only: bool,
        entropy: bool,
        partition: bool,
    ) -> dict[str, Any]:
        """What `forward` returns, of the hidden states [M, H] at the trained tokens."""
        if hidden_only:
            # The head of an anchor's shards is whole in here alone, and is used later.
            head = self.head
            is_anchor = not any(p.requires_grad for p in self.parameters())
            if is_anchor and isinstance(self, FSDPModule):
                is_divided = any(isinstance(p, DTensor) for p in head.module.parameters())
                copied = whole_copy if is_divided else copy.deepcopy
                head = replace(head, module=copied(head.module))
            return {"hidden": hidden, "head": head}

        results = head_figures(
            self.head,
            hidden,
            rows.labels,
            statistics,
            anchor,
            entropy=entropy,
            partition=partition,
        )
        if self.value_head is not None:
            results["values"] = self.value_head(hidden.to(self.value_head.weight.dtype))[
                :, 0
            ].clone()
        if self.bin_head is not None:
            embedded = causal_lm(self.model).get_input_embeddings()(rows.labels)
            bins = self.bin_head(hidden, embedded)
            results |= {BIN.format(number): law for number, law in enumerate(bins.unbind(-1))}
        return results

    def touch(self) -> None:
        """A forward of one token, of which nothing is used."""
        device = next(self.parameters()).device
        self(build_rows([stand_in()], "padded", device), entropy=False)

    def adapter_disabled(self) -> AbstractContextManager[Any]:
        """The model without its adapter; nothing to do for a model that has none."""
        if not hasattr(self.model, "disable_adapter"):
            return nullcontext()
        context: AbstractContextManager[Any] = self.model.disable_adapter()
        return context


def _check_positions(rows: Rows, limit: int) -> None:
    """DataError for rows that reach beyond the model's table of positions."""
    longest = int(rows.position_ids.max()) + 1 if rows.branched else rows.input_ids.shape[1]
    if longest > limit:
        raise DataError(
            f"a row reaches position {longest}, but the model has {limit}; "
            f"set data.max_length={limit + 1} or lower"
        )


def frozen(module: PolicyModule) -> PolicyModule:
    """The module without gradients or heads of its own, in evaluation mode."""
    module.value_head = None
    module.bin_head = None
    return module.requires_grad_(False).eval()
