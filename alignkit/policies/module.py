"""The one module that is trained: backbone, head and value head behind a single forward.

Policy parameters are touched nowhere else, so that DDP and FSDP see every use of them.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from alignkit.batches import Statistic
from alignkit.policies.head import AnchorStates, Head, head_figures
from alignkit.policies.layout import Rows, attention_mask
from alignkit.policies.packing import FLEX, packing_of, take_runs


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers causal LM inside, without peft's wrapper (the adapters are in its layers)."""
    return (
        model.get_base_model()
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        else model
    )


def context_length(model: nn.Module) -> int:
    """Tokens that a transformers model reads at once; a very large number where its config names no
    limit.
    """
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def layer_windows(config) -> dict[str, int | None]:
    """Sliding window per layer type of a model's config; the single key "" for a model that takes
    one mask.
    """
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if not types:
        return {"": window}
    return {name: window if name == "sliding_attention" else None for name in dict.fromkeys(types)}


class PolicyModule(nn.Module):
    """A causal LM (with its adapters) and, where the plan asks for it, a value head on its last
    hidden states.
    """

    def __init__(self, model: nn.Module, *, values: bool = False) -> None:
        super().__init__()
        self.model = model
        take_runs(causal_lm(model))
        self.windows = layer_windows(model.config)
        self.value_head: nn.Linear | None = None
        if values:
            first = next(model.parameters())
            width = model.config.get_text_config().hidden_size
            self.value_head = nn.Linear(width, 1, device=first.device)
            # values start at 0: the first advantages are the plain returns
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    @property
    def head(self) -> Head:
        """The model's own head."""
        return Head.of(causal_lm(self.model))

    @property
    def packing(self) -> float | None:
        """See `alignkit.policies.packing.packing_of`."""
        return packing_of(causal_lm(self.model))

    def _hidden(self, rows: Rows) -> Tensor:
        """Last hidden states at the tokens that predict the labels: [M, H]."""
        lm = causal_lm(self.model)
        kernel = lm.config._attn_implementation
        additive = next(lm.parameters()).dtype if kernel == "eager" else None
        mask = attention_mask(rows, self.windows, additive=additive, blocks=kernel == FLEX)
        # position_ids only where they say something: given without need, they send models down
        # slower paths
        positions = {"position_ids": rows.position_ids} if rows.branched else {}
        output = lm.base_model(
            input_ids=rows.input_ids, attention_mask=mask, use_cache=False, **positions
        )
        return output.last_hidden_state.flatten(0, 1)[rows.sources]

    def forward(
        self,
        rows: Rows,
        statistics: Mapping[str, Statistic] | None = None,
        anchor: AnchorStates | None = None,
        *,
        hidden_only: bool = False,
        entropy: bool = True,
    ) -> dict[str, Tensor]:
        """Figures of the trained tokens: {"policy", "entropy", statistics, "anchor", "values"}: [M]
        each.

        `hidden_only` returns {"hidden": [M, H]} instead: an anchor's states for the policy's
        statistics.
        """
        hidden = self._hidden(rows)
        if hidden_only:
            return {"hidden": hidden}
        figures = head_figures(
            self.head, hidden, rows.labels, statistics or {}, anchor, entropy=entropy
        )
        if self.value_head is not None:
            figures["values"] = self.value_head(hidden.to(self.value_head.weight.dtype))[:, 0]
        return figures

    def adapter_disabled(self) -> AbstractContextManager:
        """The model without its adapter; nothing to do for a model that has none."""
        return (
            self.model.disable_adapter()
            if hasattr(self.model, "disable_adapter")
            else nullcontext()
        )
