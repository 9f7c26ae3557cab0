"""The policy's weights as files, and the dtype in which they are saved."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from alignkit.config.model import ModelConfig
from alignkit.files import write_json
from alignkit.policies.bins import save_bins
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
