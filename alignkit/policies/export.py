"""The policy's weights as one checkpoint file, for an engine that loads checkpoints."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import ModelError


@torch.no_grad()
def write_weights(model: nn.Module, folder: Path, *, dtype: torch.dtype) -> Path:
    """Write `folder`/model.safetensors under a checkpoint's names, in `dtype`; a LoRA adapter is folded in. The model stays as
    it is, bit for bit."""
    state = _live(model)
    if hasattr(model, "peft_config"):
        model, state = _folded(model)
    cast: dict[int, Tensor] = {}  # tied weights stay tied
    for name, value in state.items():
        if value.is_floating_point():
            state[name] = cast.setdefault(value.data_ptr(), value.to(dtype))
    model.save_pretrained(folder, state_dict=state, max_shard_size="100TB")
    return folder / "model.safetensors"


def _live(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint as they are now. `state_dict()` would give the shards of a policy that is made whole."""
    state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                state[f"{path}.{name}".lstrip(".")] = buffer
    return state


def _folded(model: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """The base model of a LoRA model, and its weights with the active adapters' updates added."""
    from peft.tuners.lora import LoraLayer

    for name in model.active_adapters:
        config = model.peft_config[name]
        if getattr(config, "use_dora", False) or getattr(config, "modules_to_save", None) or config.bias != "none":
            raise ModelError(
                "model.adapter: DoRA, biases and whole modules of an adapter cannot be folded into a server's weights"
            )
    base, state = model.get_base_model(), {}
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    for name, value in _live(base).items():
        if ".lora_" not in name:
            state[name.replace(".base_layer.", ".")] = value
    for name, layer in layers.items():
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                state[f"{name}.weight"] = state[f"{name}.weight"] + layer.get_delta_weight(adapter)
    return base, state
