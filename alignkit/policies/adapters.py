"""Adapters in peft's layout: which model they belong on, and putting them there. Their files are
checked first, for peft's own errors do not say what is wrong with them.
"""

import json
import warnings
from pathlib import Path
from typing import Any

from alignkit.errors import ModelError, first_line

CONFIG = "adapter_config.json"


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
