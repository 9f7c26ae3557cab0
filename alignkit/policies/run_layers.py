"""Decoder layers of the Llama family on packed rows: the same numbers with fewer passes over memory.

In a packed row (`alignkit.policies.packing`) a layer's norms and rotations are functions with a
gradient of their own, which keep less for backward than the dozen operations that they stand for.
The last layer computes queries and all that follows them only at the tokens that something reads:
of a prompt, the last one. With any other mask the layers are transformers' own, and so is a layer in
which somebody has put hooks or code of their own.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from alignkit.policies.packing import KERNEL, RunMask, attend

# Families whose layers, norms and MLPs compute what is computed here, by transformers' names.
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
NORMS = tuple(f"{family}RMSNorm" for family in FAMILIES)
# transformers wraps the `forward` of a layer's class, which `take_over` puts aside; older releases
# wrap `__call__`, which stays.
CHECKPOINTS_FORWARD = "__call__" not in vars(GradientCheckpointingLayer)


def take_over(model: Any) -> bool:
    """Let the layers of a transformers model on a CPU that takes runs compute as above, where they
    are known; whether they do.
    """
    blocks = getattr(getattr(model, "model", None), "layers", None)
    if model.config._attn_implementation != KERNEL or not isinstance(blocks, nn.ModuleList):
        return False
    layers: list[Any] = list(blocks)
    if not all(_is_own(layer) and _is_own(layer.self_attn) for layer in layers):
        return False

    # Functions of single modules, because the classes serve models that alignkit does not own.
    # A partial is copied and pickled with its module.
    for layer in layers:
        layer.forward = partial(_layer, layer)
        layer.self_attn.forward = partial(_attention, layer.self_attn)
    layers[-1].forward = partial(_last_layer, layers[-1])
    return True


def _is_own(module: Any) -> bool:
    """Whether a layer or its attention is of a known family and transformers' own, or taken over."""
    names = [f"{family}{part}" for family in FAMILIES for part in ("DecoderLayer", "Attention")]
    forward = vars(module).get("forward")
    return _is_of(module, names) and (forward is None or _is_taken(forward))


def _is_of(module: Any, names: Sequence[str]) -> bool:
    """Whether a module's class is one of transformers' with these names."""
    kind = type(module)
    return kind.__name__ in names and kind.__module__.startswith("transformers.")


def _is_taken(forward: Any) -> bool:
    """Whether a module's own forward is one of those that `take_over` gives."""
    return isinstance(forward, partial) and forward.func in (_layer, _last_layer, _attention)


def _can_compute(layer: Any) -> bool:
    """Whether a layer's parts do what their classes do and nothing else. Those that are not called
    here could have hooks, or a forward that somebody has changed: then the layer is computed by
    transformers' code, which calls them.
    """
    attention = layer.self_attn
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [norm for name in ("q_norm", "k_norm") if (norm := getattr(attention, name, None))]
    mlps = [f"{family}MLP" for family in FAMILIES]
    return (
        _is_taken(vars(attention).get("forward"))
        and _is_of(layer.mlp, mlps)
        and all(_is_of(norm, NORMS) for norm in norms)
        and all(_is_untouched(module) for module in (layer.mlp, layer.mlp.act_fn, *norms))
    )


def _is_untouched(module: nn.Module) -> bool:
    """Whether to call a module is to compute what its class does: no hooks, no forward of its own."""
    state = vars(module)
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return "forward" not in state and not any(state.get(name) for name in hooks)


def _layer(layer: Any, hidden_states: Tensor, attention_mask: Any = None, **options: Any) -> Tensor:
    """A layer before the last: [1, L, H] -> [1, L, H]."""
    if not isinstance(attention_mask, RunMask) or not _can_compute(layer):
        return _as_before(layer, hidden_states, attention_mask=attention_mask, **options)
    return _checkpointed(layer, hidden_states, attention_mask, None, options)


def _last_layer(
    layer: Any, hidden_states: Tensor, attention_mask: Any = None, **options: Any
) -> Tensor:
    """The last layer, at the tokens that are read: [1, L, H] -> [1, S, H]; at all where the mask
    does not say which.
    """
    if not isinstance(attention_mask, RunMask) or attention_mask.last is None:
        return _layer(layer, hidden_states, attention_mask, **options)
    if not _can_compute(layer):
        return _layer(layer, hidden_states, attention_mask, **options)[:, attention_mask.read]
    return _checkpointed(layer, hidden_states, attention_mask.last, attention_mask.read, options)


def _checkpointed(
    layer: Any, hidden: Tensor, mask: RunMask, read: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """`_computed`, computed again in backward where the model checkpoints its gradients."""

    def compute(states: Tensor) -> Tensor:
        return _computed(layer, states, mask=mask, read=read, **options)

    if CHECKPOINTS_FORWARD and layer.gradient_checkpointing and layer.training:
        output: Tensor = layer._gradient_checkpointing_func(compute, hidden)
        return output
    return compute(hidden)


def _computed(
    layer: Any, hidden: Tensor, *, mask: RunMask, read: Tensor | None, **options: Any
) -> Tensor:
    """What a layer makes of [1, L, H], at the tokens `read` [S] or at all."""
    attended, _ = layer.self_attn(
        rms_norm(layer.input_layernorm, hidden), attention_mask=mask, read=read, **options
    )
    return _through_mlp(layer, hidden if read is None else hidden[:, read], attended)


def _through_mlp(layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    """What a layer makes of its input and of what its attention gave."""
    hidden = hidden + attended
    mlp = layer.mlp
    normed = rms_norm(layer.post_attention_layernorm, hidden)
    gate = mlp.gate_proj(normed)
    up = mlp.up_proj(normed)
    return hidden + mlp.down_proj(_gated(mlp.act_fn, gate, up))


def _gated(activation: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """An MLP's inner states, activation(gate) up."""
    if type(activation) is nn.SiLU or _is_of(activation, ("SiLUActivation",)):
        inner: Tensor = _SiLUGate.apply(gate, up)  # type: ignore[no-untyped-call]
        return inner
    return activation(gate) * up


def _attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    *,
    read: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """A layer's attention, [1, L, H] -> [1, L, H], or [1, S, H] at the tokens `read`."""
    if not isinstance(attention_mask, RunMask):
        return _as_before(
            module,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **options,
        )

    cos, sin = (values[:, :, None] for values in position_embeddings)
    shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    asking, cos_asked, sin_asked = hidden_states, cos, sin
    if read is not None:
        asking, cos_asked, sin_asked = hidden_states[:, read], cos[:, read], sin[:, read]
    query = module.q_proj(asking).view(1, asking.shape[1], -1, module.head_dim)
    key = module.k_proj(hidden_states).view(shape)
    value = module.v_proj(hidden_states).view(shape)
    if hasattr(module, "q_norm"):
        query = rms_norm(module.q_norm, query)
        key = rms_norm(module.k_norm, key)

    query = rotated(query, cos_asked, sin_asked).transpose(1, 2)
    key = rotated(key, cos, sin).transpose(1, 2)
    dropout = module.attention_dropout if module.training else 0.0
    attended, _ = attend(
        module,
        query,
        key,
        value.transpose(1, 2),
        attention_mask,
        dropout=dropout,
        scaling=module.scaling,
    )
    return module.o_proj(attended.flatten(2)), None


def _as_before(module: nn.Module, *arguments: Any, **options: Any) -> Any:
    """What transformers computes here."""
    return type(module).forward(module, *arguments, **options)


def rms_norm(norm: Any, x: Tensor) -> Tensor:
    """What a norm of `NORMS` gives in float32; any other norm, or dtype, as it is: [..., H]."""
    # A shard of a weight is no parameter of its own kind.
    known = _is_of(norm, NORMS) and type(norm.weight) is nn.Parameter
    if not known or x.dtype != torch.float32 or norm.weight.dtype != torch.float32:
        given: Tensor = norm(x)
        return given
    normed: Tensor = _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
    return normed


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, x cos + (-x2, x1) sin for the halves x1, x2 of each head:
    [1, L, heads, D], and cos, sin [1, L, 1, D] -> [1, L, heads, D].
    """
    wide = torch.promote_types(x.dtype, cos.dtype)
    turned: Tensor = _Rotation.apply(x.to(wide), cos.to(wide), sin.to(wide))  # type: ignore[no-untyped-call]
    return turned


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        inverse = squares.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return torch.mul(x, inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        width = x.shape[-1]
        products = (grad * x).reshape(-1, width)
        weight_grad = products.T @ inverse.reshape(-1)

        # d/dx of x r is r - x r^3 x / width.
        along = (products @ weight).view(inverse.shape)
        x_grad = torch.mul(grad, weight).mul_(inverse)
        x_grad.addcmul_(x, inverse.pow(3).mul_(along), value=-1 / width)
        return x_grad, weight_grad, None


class _SiLUGate(torch.autograd.Function):
    """silu(gate) up, of tensors of one shape. Backward computes silu(gate) again, where autograd would
    keep it.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        gate_grad = torch.ops.aten.silu_backward(grad * up, gate)
        return gate_grad, functional.silu(gate).mul_(grad)


class _Rotation(torch.autograd.Function):
    """Turns the pairs of a head's two halves by the angles of their position."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # The same turn the other way round, since both halves have the same angles.
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
    return torch.mul(x, cos).addcmul_(x.roll(half, -1), signed)
