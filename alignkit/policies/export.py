"""The policy's weights as one checkpoint file, for an engine that loads checkpoints."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alignkit.errors import ModelError


@torch.no_grad()
def write_weights(model: nn.Module, folder: Path, *, dtype: torch.dtype) -> Path:
    """Write `folder`/model.safetensors under a checkpoint's names, in `dtype`; a LoRA adapter is
    folded in. The model stays as it is, bit for bit.
    """
    base, lora_layers = _unwrapped(model)
    state: dict[str, Tensor] = {}
    converted: dict[int, Tensor] = {}  # by address, so that tied weights stay tied

    for name, value in _live(base).items():
        if ".lora_" in name:
            continue  # folded into the layer's own weight below
        name = name.replace(".base_layer.", ".")
        target_dtype = dtype if value.is_floating_point() else value.dtype
        layer = lora_layers.get(name.removesuffix(".weight"))
        if layer is None:
            state[name] = converted.setdefault(value.data_ptr(), value.to("cpu", target_dtype))
        else:
            adapters = [a for a in layer.active_adapters if a in layer.lora_A]
            update = sum(layer.get_delta_weight(adapter) for adapter in adapters)
            state[name] = (value + update).to("cpu", target_dtype)

    base.save_pretrained(folder, state_dict=state, max_shard_size="100TB")
    return folder / "model.safetensors"


def _live(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint as they are now. `state_dict()` would give the shards of a policy
    that is made whole.
    """
    state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                state[f"{path}.{name}".lstrip(".")] = buffer
    return state


def _unwrapped(model: Any) -> tuple[Any, dict[str, Any]]:
    """The causal language model itself, and its LoRA layers by name."""
    if not hasattr(model, "peft_config"):
        return model, {}
    from peft.tuners.lora import LoraLayer

    for name in model.active_adapters:
        config = model.peft_config[name]
        if (
            getattr(config, "use_dora", False)
            or getattr(config, "modules_to_save", None)
            or config.bias != "none"
        ):
            raise ModelError(
                "model.adapter: DoRA, biases and whole modules of an adapter cannot be folded into "
                "a server's weights"
            )
    base = model.get_base_model()
    return base, {
        name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)
    }
