"""A model that the caller holds, made ready for training in place of one loaded from a folder."""

from typing import Any

import torch
from torch import nn

from alignkit.config.adapter_kinds import why_unfit
from alignkit.config.model import ModelConfig
from alignkit.errors import ConfigError, ModelError
from alignkit.policies.module import causal_lm
from alignkit.policies.reference import START_ADAPTER

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def adopt(
    model: Any, config: ModelConfig, *, device: torch.device | str, dtype: str
) -> tuple[Any, Any, dict[str, float]]:
    """The causal LM inside `model`, `model` itself if it is peft's (else None), and the dropout
    rates that its config had.

    The model is moved to `device`, cast to the recipe's dtype and put into evaluation mode, and its
    dropout is off. An adapter that it has keeps a frozen twin, from which the KL is measured.
    ModelError for what is no causal language model and for adapters that cannot be trained here,
    ConfigError for an adapter of the recipe on top of the model's own.
    """
    _check_adapters(model)
    inner = causal_lm(model)
    if not hasattr(inner, "config") or inner.get_output_embeddings() is None:
        raise ModelError(
            f"model: {type(inner).__name__} has no language-model head; give a causal language model"
        )
    adapted = model if inner is not model else None
    if adapted is not None and config.adapter is not None:
        raise ConfigError("model.adapter: the model has an adapter of its own; leave the field out")

    rates = without_dropout(inner)
    inner.to(device=device, dtype=DTYPES[dtype if config.dtype == "auto" else config.dtype])
    if config.attention != "auto":
        inner.set_attn_implementation(config.attention)
    if adapted is not None:
        _keep_start(adapted)
    model.eval()
    return inner, adapted, rates


def _check_adapters(model: Any) -> None:
    """ModelError for a peft model with an adapter that cannot be trained here."""
    if type(model).__name__ == "PeftMixedModel":
        raise ModelError(
            "model: a PeftMixedModel has adapters of several kinds, and one is trained here; give "
            "a PeftModel"
        )
    for config in getattr(model, "peft_config", {}).values():
        why = why_unfit(config.to_dict(), "continued")
        if why is not None:
            raise ModelError(f"model: its adapter cannot be trained here: {why}")


def without_dropout(model: Any) -> dict[str, float]:
    """Switch dropout off in the config and in every module, and return the config's rates."""
    rates = config_without_dropout(model.config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)
    return rates


def config_without_dropout(config: Any) -> dict[str, float]:
    """Set the dropout rates of a config to 0, and return what they were.

    Dropout would make the policy differ from its own reference.
    """
    rates = {
        name: value
        for name, value in config.to_dict().items()
        if name.endswith(("dropout", "_pdrop")) and isinstance(value, float) and value > 0
    }
    for name in rates:
        setattr(config, name, 0.0)
    return rates


def _keep_start(model: Any) -> None:
    """A frozen twin of the active adapter: where training begins, and what the KL is measured from."""
    active = model.active_adapter
    if START_ADAPTER in model.peft_config:
        model.delete_adapter(START_ADAPTER)  # of an earlier run of the same object
    model.add_adapter(START_ADAPTER, model.peft_config[active])

    trained = dict(model.named_parameters())
    for name, parameter in trained.items():
        if f".{START_ADAPTER}." in name or name.endswith(f".{START_ADAPTER}"):
            parameter.data.copy_(trained[name.replace(f".{START_ADAPTER}", f".{active}")].data)
            parameter.requires_grad_(False)
    model.set_adapter(active)
