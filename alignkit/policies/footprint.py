"""How much memory a model takes in training, worked out from its config alone.

Parameters are counted on torch's meta device. What a forward leaves for its backward is measured on
a model of one and of two layers whose tensors are fakes: they have shapes and no contents.
"""

import copy
import warnings
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM

from alignkit.batches import Bundle
from alignkit.config.model import ModelConfig
from alignkit.errors import ModelError, first_line
from alignkit.policies.adapters import add_adapter
from alignkit.policies.layout import Rows, build_rows
from alignkit.policies.live import DTYPES, config_without_dropout
from alignkit.policies.module import PolicyModule, causal_lm
from alignkit.policies.tensor_parallel import check_plan

AUTO: Any = AutoModelForCausalLM


@dataclass(frozen=True)
class Footprint:
    """What a model takes. Counts are of parameters, the others are bytes."""

    parameters: int
    trained: int
    block: int  # parameters of the largest block, which shards are gathered into
    block_trained: int
    rest: int  # parameters outside of all blocks: embedding, head and last norm
    rest_trained: int
    tied: bool  # whether the head's weight is the embedding's
    layers: int
    width: int  # of hidden states
    # What follows is a process's share where several compute together.
    saved: int  # bytes that the forward of one micro-batch leaves for its backward
    workspace: int  # bytes that come and go on top of these
    cache: int  # bytes of keys and values of one token while sampling, in the compute dtype


def footprint(
    model: ModelConfig, *, tokens: int, length: int, dtype: str = "bfloat16", tensor: int = 1
) -> Footprint:
    """The footprint of training `model` on micro-batches of `tokens` tokens in rows of `length`.

    `dtype` is that of the computation: bfloat16 is autocast over weights in `model.dtype`. So many
    as `tensor` processes compute the micro-batches of all of them together. No weights are read.
    Raises ModelError for a model whose config cannot be read, or that cannot be cut.
    """
    config = _config(model)
    whole = _module(config, model)
    if tensor > 1:
        check_plan(causal_lm(whole.model), tensor)
    blocks = _blocks(whole)
    block = max(blocks, key=_count, default=whole)
    layers = config.get_text_config().num_hidden_layers

    computed = tokens * tensor
    one, _ = _step(_cut(config, 1, tensor), model, computed, length, dtype)
    two, workspace = _step(_cut(config, 2, tensor), model, computed, length, dtype)
    parameters = _count(whole)
    trained = _count(whole, trained=True)

    return Footprint(
        parameters=parameters,
        trained=trained,
        block=_count(block),
        block_trained=_count(block, trained=True),
        rest=parameters - sum(map(_count, blocks)),
        rest_trained=trained - sum(_count(one, trained=True) for one in blocks),
        tied=bool(config.get_text_config().tie_word_embeddings),
        layers=layers,
        width=config.get_text_config().hidden_size,
        saved=one + (layers - 1) * (two - one),
        workspace=workspace,
        cache=_cache(config) * DTYPES[dtype].itemsize,
    )


def _config(model: ModelConfig) -> Any:
    try:
        config = AutoConfig.from_pretrained(
            model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        config_without_dropout(config)
        with torch.device("meta"):
            AUTO.from_config(_cut(config, 1))
    except Exception as error:  # loaders raise anything
        raise ModelError(
            f"model.name_or_path: no causal language model can be planned from the config of "
            f"{model.name_or_path}: {first_line(error)}"
        ) from error
    return config


def _cut(config: Any, layers: int, tensor: int = 1) -> Any:
    """The config of the same model with fewer layers, of which a process computes its part."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    if tensor > 1:
        text.head_dim = getattr(text, "head_dim", None) or (
            text.hidden_size // text.num_attention_heads
        )
        for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            setattr(text, field, getattr(text, field) // tensor)
    return short


def _module(config: Any, model: ModelConfig) -> PolicyModule:
    """The trained module with its adapter, on the meta device."""
    dtype = DTYPES["float32" if model.dtype == "auto" else model.dtype]
    # Experts without contents have a kernel for bfloat16 alone.
    dtype = torch.bfloat16 if _experts(config) else dtype
    with torch.device("meta"):
        inner: Any = AUTO.from_config(config, dtype=dtype)
        if model.gradient_checkpointing:
            with warnings.catch_warnings():  # the method's new name is not in older releases
                warnings.simplefilter("ignore", FutureWarning)
                inner.gradient_checkpointing_enable(
                    gradient_checkpointing_kwargs={"use_reentrant": False}
                )
        if model.adapter is not None:
            inner = add_adapter(inner, model.adapter.model_copy(update={"path": None}), seed=0)
        return PolicyModule(inner)


def _experts(config: Any) -> int:
    text = config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((n for n in (getattr(text, name, None) for name in names) if n), 0)


def _blocks(module: PolicyModule) -> list[nn.Module]:
    """The parts that `alignkit.policies.sharding.shard` shards one by one."""
    language_model = causal_lm(module.model)
    names = set(getattr(language_model, "_no_split_modules", None) or ())
    return [part for part in language_model.modules() if type(part).__name__ in names]


def _count(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def _cache(config: Any) -> int:
    """Numbers that the keys and values of one token are, over all layers."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    return int(2 * text.num_hidden_layers * groups * width)


def _step(config: Any, model: ModelConfig, tokens: int, length: int, dtype: str) -> tuple[int, int]:
    """Bytes that a forward leaves for its backward, and bytes that come on top of these until the
    backward is done, gradients of parameters apart.
    """
    rows = _rows(tokens, length)
    autocast = torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else nullcontext()

    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        module = _on_cpu(_module(config, model)).train()
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_forget)
        moved: dict[str, Any] = {
            name: fakes.from_tensor(value)
            for name, value in vars(rows).items()
            if isinstance(value, Tensor)
        }
        fake_rows = replace(rows, **moved)
        with LiveBytes([*module.parameters(), *module.buffers()]) as live:
            with autocast:
                results = module(fake_rows)
            saved = live.now
            results["policy"].sum().backward()
    return saved, live.peak - saved


def _on_cpu(module: PolicyModule) -> PolicyModule:
    """The module with all its tensors on the CPU, tied ones still tied; inside a fake mode they take
    no memory there either.
    """
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    copied: Tensor = torch.empty_like(tensor, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        copied = nn.Parameter(copied, requires_grad=tensor.requires_grad)
                    moved[id(tensor)] = copied
                tensors[name] = moved[id(tensor)]  # type: ignore[assignment]
    return module


def _forget(parameter: Tensor) -> None:
    """Gradients of parameters are counted by their number, not here."""
    parameter.grad = None


def _rows(tokens: int, length: int) -> Rows:
    """As many prompts with one completion as `tokens` hold, half of each trained on."""
    half = max(1, length // 2)
    ids = torch.ones(half, dtype=torch.long)
    bundle = Bundle(ids, [ids], [torch.ones(half, dtype=torch.bool)], "")
    return build_rows([bundle] * max(1, tokens // (2 * half)), "padded")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside the block and are alive: `now`, and at
    most (`peak`). The storages of `known` tensors do not count.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operator, and count what is new in its results."""
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
