"""Adapters in peft's layout: added to a model, and found again together with the model that they
belong on. Their files are checked first, for peft's own errors do not say what is wrong with them.
"""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from alignkit.config.model import AdapterConfig, ModelConfig
from alignkit.errors import ModelError, first_line
from alignkit.files import read_manifest
from alignkit.policies.reference import START_ADAPTER
from alignkit.policies.weights import check_base, check_files

CONFIG = "adapter_config.json"


def add_adapter(model: Any, adapter: AdapterConfig, *, seed: int) -> Any:
    """The model with a LoRA adapter: a new one, or one to train on, of which a frozen copy stays as
    the reference. Raises ModelError.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = _new(model, adapter) if adapter.path is None else _loaded(model, adapter.path)

    # What is saved is to be found from every working directory.
    base = Path(model.name_or_path).expanduser()
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = str(base.resolve()) if base.is_dir() else str(base)
    return adapted


def _new(model: Any, adapter: AdapterConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise ModelError(f"model.adapter.target_modules: {first_line(error)}") from error


def _loaded(model: Any, path: str) -> Any:
    folder = Path(path)
    if not (folder / CONFIG).exists():
        raise ModelError(
            f"model.adapter.path: there is no adapter_config.json in {path}; give a "
            "folder written by peft"
        )
    check_files(folder, "model.adapter.path")
    adapted = with_adapter(model, folder, "model.adapter.path", trainable=True)
    return with_adapter(adapted, folder, "model.adapter.path", name=START_ADAPTER)


def base_of(folder: Path, settings: ModelConfig, field: str) -> ModelConfig:
    """The model that the adapter in `folder` belongs on, where it lies now; all other `settings`
    stay. `field` of the recipe names the folder in errors.

    ModelError for an adapter that is damaged or names no model, CheckpointError for a base model
    that is not the one that the adapter was trained on.
    """
    check_files(folder, field)
    name = adapter_base(folder, field)
    name = next((str(place) for place in _places(folder, name) if _is_model(place)), name)

    identity = read_manifest(folder).get("identity", {})
    revision = identity.get("model", {}).get("revision")
    check_base(folder, name, revision)
    return settings.model_copy(update={"name_or_path": name, "revision": revision})


def _places(folder: Path, name: str) -> Iterator[Path]:
    """Where the base model may lie: where the adapter says, seen from the working directory and
    from the adapter, and, if that is a path and no hub name, beside the adapter or its run.
    """
    named = Path(name).expanduser()
    above = [folder, *folder.absolute().parents[:2]]
    yield named
    for place in above:
        yield place / named
    if named.is_absolute() or len(named.parts) > 2 or name.startswith("."):
        for place in above:
            yield place / named.name


def _is_model(place: Path) -> bool:
    return (place / "config.json").is_file()


def adapter_base(folder: Path, field: str) -> str:
    """The name or path of the model that the adapter in `folder` belongs on. `field` of the recipe
    names the folder in errors. ModelError where the adapter does not say.
    """
    name = _config(folder, field).get("base_model_name_or_path")
    if not (isinstance(name, str) and name):
        raise ModelError(
            f"{field}: {folder / CONFIG} says {name!r} where base_model_name_or_path should name "
            "the model that the adapter belongs on; write its folder or hub name there"
        )
    return name


def with_adapter(
    model: Any, folder: Path, field: str, *, trainable: bool = False, name: str = "default"
) -> Any:
    """The model with the adapter in `folder` on it, called `name`. A model that carries another
    already gets this one beside it. Raises ModelError.
    """
    from peft import PeftModel

    _config(folder, field)
    try:
        # Weights that the file lacks are no more than a warning to peft, and would be random.
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), name, is_trainable=trainable)
                return model
            return PeftModel.from_pretrained(
                model, str(folder), adapter_name=name, is_trainable=trainable
            )
    except Exception as error:  # peft and safetensors raise anything for what a file may hold
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(
            f"{field}: the adapter in {folder} does not fit on its model, or is damaged: {reason}"
        ) from error


def _config(folder: Path, field: str) -> dict[str, Any]:
    """adapter_config.json as an object of a kind that peft knows. Raises ModelError."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{field}: {file} cannot be read: {first_line(error)}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{field}: {file} holds no JSON object; give a folder written by peft")

    kind = config.get("peft_type")
    known = sorted(str(getattr(each, "value", each)) for each in PEFT_TYPE_TO_CONFIG_MAPPING)
    if kind not in known:
        raise ModelError(
            f"{field}: {file} has the peft_type {kind!r}; this version of peft knows "
            f"{', '.join(known)}"
        )
    return config
