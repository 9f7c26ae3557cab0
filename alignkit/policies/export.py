"""The policy's weights as files: one checkpoint for an engine that loads checkpoints, and the dtype
of a model that is saved.
"""

import json
import logging
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from alignkit.config.model import ModelConfig
from alignkit.errors import ModelError
from alignkit.files import write_json
from alignkit.policies.bins import save_bins
from alignkit.policies.dtensors import full
from alignkit.policies.reference import START_ADAPTER
from alignkit.policies.reward_head import save_reward_head
from alignkit.policies.weights import model_folder, weight_files

log = logging.getLogger("alignkit")

SAVE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def stored_dtype(model: ModelConfig) -> torch.dtype:
    """The dtype of the model's files: what its config says, else that of its first weights."""
    folder = model_folder(model.name_or_path, model.revision)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    for part in (config, config.get_text_config()):
        dtype = getattr(part, "dtype", None)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, None)
        if isinstance(dtype, torch.dtype):
            return dtype

    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            continue
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  the handle is no mapping
                dtype = weights.get_tensor(name).dtype
                if dtype.is_floating_point:
                    return dtype
    return torch.float32


def dtype_to_save(model: ModelConfig, *, of: Any = None) -> torch.dtype:
    """The dtype in which a model trained from `model` is saved; `of` is the model itself where it
    was not loaded from files.
    """
    if model.save_dtype != "auto":
        return SAVE_DTYPES[model.save_dtype]
    dtype = stored_dtype(model) if of is None else of.dtype
    return dtype if dtype in SAVE_DTYPES.values() else torch.float32  # such as float8


def in_dtype(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of `state` on the CPU, floating-point ones in `dtype`; tied weights stay tied."""
    converted: dict[tuple[int, torch.Size], Tensor] = {}  # by address and shape
    result = {}
    for name, value in state.items():
        key = (value.data_ptr(), value.shape)
        if not value.is_floating_point():
            result[name] = value
            continue
        if key not in converted:
            converted[key] = value.detach().to("cpu", dtype)
        result[name] = converted[key]
    return result


@contextmanager
def with_fields(config: Any, fields: Mapping[str, object]) -> Iterator[None]:
    """Inside the block, some fields of a model's config have other values."""
    before = {name: getattr(config, name) for name in fields}
    for name, value in fields.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def save_model(model: Any, folder: Path | str, dtype: torch.dtype | None) -> None:
    """Write a model, or the adapter that is trained on it, so that `from_pretrained` loads it.

    `dtype` is that of the files, None: as in memory; an adapter, which is small, is always written
    as it was trained.
    """
    if hasattr(model, "peft_config"):
        save_adapter(model, folder)
    elif dtype in (None, model.dtype):
        model.save_pretrained(folder)
    else:
        assert dtype is not None
        save_in_dtype(model, folder, model.state_dict(), dtype)


def save_heads(module: Any, folder: Path | str, *, writes: bool) -> None:
    """Write what a policy's module has beside its model and a finished run needs: the bins of a
    learned value, the rewards of whole completions. As `save_bins` in several processes.
    """
    if module.bin_head is not None:
        save_bins(module.bin_head, folder, writes=writes)
    if module.rewards:
        save_reward_head(module.value_head, folder, writes=writes)


def save_adapter(model: Any, folder: Path | str, state: dict[str, Tensor] | None = None) -> None:
    """Write the adapter that is trained on a model. `state` takes the place of the model's own
    tensors where those are shards.
    """
    selected = [name for name in model.peft_config if name != START_ADAPTER]
    model.save_pretrained(folder, state_dict=state, selected_adapters=selected)


def save_in_dtype(
    model: Any, folder: Path | str, state: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """`model.save_pretrained` of `state` in `dtype`. Weights that float16 cannot hold are saved as
    they are, and the log says so.
    """
    state = {name: value.detach() for name, value in state.items()}
    saved = in_dtype(state, dtype)
    if dtype is torch.float16 and not all(bool(v.isfinite().all()) for v in saved.values()):
        log.warning("some weights are too large for float16; the model is saved as it was trained")
        model.save_pretrained(folder, state_dict=state)
        return
    model.save_pretrained(folder, state_dict=saved)
    note_dtype(Path(folder), dtype)


def note_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Write the files' dtype into the config; save_pretrained notes that of the model in memory."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    for part in config.values():
        if isinstance(part, dict) and part.get("dtype"):
            part["dtype"] = config["dtype"]
    write_json(file, config, indent=2)


@torch.no_grad()
def write_weights(model: nn.Module, folder: Path, *, dtype: torch.dtype) -> Path:
    """Write `folder`/model.safetensors under a checkpoint's names, in `dtype`; a LoRA adapter is
    folded in. The model stays as it is, bit for bit.
    """
    base, _ = _unwrapped(model)
    state: dict[str, Tensor] = {}
    converted: dict[Hashable, Tensor] = {}  # tied weights stay tied

    for name, key, value in _merged(model):
        target_dtype = dtype if value.is_floating_point() else value.dtype
        if key not in converted:
            converted[key] = full(value).to("cpu", target_dtype)
        state[name] = converted[key]

    base.save_pretrained(folder, state_dict=state, max_shard_size="100TB")
    return folder / "model.safetensors"


@torch.no_grad()
def take_part(model: nn.Module) -> None:
    """Lend this process's shards to those that `write_weights`."""
    seen: set[Hashable] = set()
    for _, key, value in _merged(model):
        if key not in seen:
            seen.add(key)
            full(value)


def _merged(model: nn.Module) -> Iterator[tuple[str, Hashable, Tensor]]:
    """Name and value of each tensor of a checkpoint, with LoRA's update added to it; between them
    a key that tied ones share.
    """
    base, lora_layers = _unwrapped(model)
    for name, value in _live(base).items():
        if ".lora_" in name:
            continue  # folded into the layer's own weight below
        name = name.replace(".base_layer.", ".")
        layer = lora_layers.get(name.removesuffix(".weight"))
        key: Hashable = id(value) if layer is None else name
        if layer is not None:
            adapters = [a for a in layer.active_adapters if a in layer.lora_A]
            value = value + sum(layer.get_delta_weight(adapter) for adapter in adapters)
        yield name, key, value


def _live(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint as they are now, tied ones under each of their names."""
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
        beyond_matrices = ("use_dora", "modules_to_save", "target_parameters")
        if (
            config.peft_type != "LORA"
            or config.bias != "none"
            or any(getattr(config, name, None) for name in beyond_matrices)
        ):
            raise ModelError(
                "model.adapter: DoRA, biases, whole modules, single parameters and kinds other than "
                "LORA cannot be folded into a server's weights"
            )
    base = model.get_base_model()
    return base, {
        name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)
    }
