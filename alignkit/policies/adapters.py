"""Adapters in peft's layout: added to a model, and found again together with the model that they
belong on. Their files are checked first, for peft's own errors do not say what is wrong with them.
"""

import json
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from alignkit.config.adapter_kinds import ADAPTER_FILE, check_kind
from alignkit.config.model import AdapterConfig, ModelConfig, check_adapter
from alignkit.config.validation import nearest
from alignkit.errors import ConfigError, ModelError, first_line
from alignkit.files import read_manifest
from alignkit.policies.layout import Rows
from alignkit.policies.module import PolicyModule
from alignkit.policies.probe import HALF_TOLERANCE, HEAD_TOLERANCE
from alignkit.policies.reference import START_ADAPTER, Anchor
from alignkit.policies.weights import check_base, check_files


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
    from peft import get_peft_model

    field = "model.adapter.peft" if adapter.peft else "model.adapter.target_modules"
    settings = _settings(adapter)
    try:
        return get_peft_model(model, settings)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"{field}: {first_line(error)}") from error


def _settings(adapter: AdapterConfig) -> Any:
    """The config that peft takes for a new adapter. Raises ConfigError."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    given = dict(adapter.peft or {})
    kind = str(given.pop("peft_type", "LORA")).upper()
    configs = {
        str(getattr(key, "value", key)): cls for key, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    if kind not in configs:
        raise ConfigError(
            f"model.adapter.peft: peft knows no peft_type {kind}; it knows {', '.join(sorted(configs))}"
        )

    settings: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if "target_parameters" not in given or "target_modules" in adapter.model_fields_set:
        settings["target_modules"] = adapter.target_modules
    if kind == "LORA":
        settings |= {
            "r": adapter.r,
            "lora_alpha": adapter.alpha,
            "lora_dropout": adapter.dropout,
        }

    known = {field.name for field in fields(configs[kind])}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ConfigError(
            f"model.adapter.peft: {configs[kind].__name__} of the installed peft has no field "
            f"{', '.join(unknown)}.{nearest(unknown[0], known)}"
        )
    return configs[kind](**{k: v for k, v in settings.items() if k in known} | given)


def start_of(model: ModelConfig) -> ModelConfig:
    """Where a run begins whose `name_or_path` is an adapter's folder: the adapter's base model, with
    the adapter on it to be trained further. Any other model as it is.

    ConfigError for another adapter on top of it; otherwise as `base_of`.
    """
    folder = Path(model.name_or_path).expanduser()
    if not (folder / ADAPTER_FILE).is_file():
        return model
    if model.adapter is not None:
        raise ConfigError(
            f"model.adapter: {model.name_or_path} is an adapter already, which is trained further; "
            "leave model.adapter out, or merge it first (alignkit merge)"
        )
    check_kind(folder, "model.name_or_path", "continued")
    base = base_of(folder, model, "model.name_or_path")
    adapter = AdapterConfig(path=str(folder.resolve()))
    return base.model_copy(update={"adapter": adapter})


def tokenizer_source(model: ModelConfig) -> ModelConfig:
    """What to load the tokenizer from: the folder of a pretrained adapter that has one, for its
    template or tokens may be its own, else the model.
    """
    path = model.adapter.path if model.adapter is not None else None
    if path is None or not (Path(path) / "tokenizer_config.json").is_file():
        return model
    return model.model_copy(update={"name_or_path": path, "revision": None})


@torch.no_grad()
def starts_without(module: PolicyModule, rows: Rows) -> bool:
    """Whether the policy with its adapter off (of a pretrained adapter: with its frozen twin) is
    where training begins, and stays there however the trained parameters move.

    It is not for adapters that train biases of the model itself, that change its weights as they
    are made (PiSSA), or that begin at random.
    """
    anchor = Anchor("adapter_off")
    start = module(rows)["policy"]
    with anchor.active(module, module):
        before = module(rows)["policy"]

    trained = [p for p in module.parameters() if p.requires_grad]
    weights = [p.detach().clone() for p in trained]
    for parameter in trained:
        parameter.mul_(1.1).add_(0.01)  # which shards can do too
    with anchor.active(module, module):
        after = module(rows)["policy"]
    for parameter, value in zip(trained, weights):
        parameter.copy_(value)

    tolerance = HEAD_TOLERANCE if trained[0].dtype == torch.float32 else HALF_TOLERANCE
    near = float((start - before).abs().max()) <= tolerance
    return near and torch.equal(before, after)


def _loaded(model: Any, path: str) -> Any:
    check_adapter(path)
    folder = Path(path).expanduser()
    check_files(folder, "model.adapter.path")
    adapted = with_adapter(model, folder, "model.adapter.path", trainable=True)
    return with_adapter(adapted, folder, "model.adapter.path", name=START_ADAPTER)


def base_of(folder: Path, settings: ModelConfig, field: str) -> ModelConfig:
    """The model that the adapter in `folder` belongs on, where it lies now; all other `settings`
    stay. `field` of the recipe names the folder in errors.

    ModelError for an adapter that is damaged, cannot be used or names no model, CheckpointError for
    a base model that is not the one that the adapter was trained on.
    """
    check_files(folder, field)
    check_kind(folder, field)
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
            f"{field}: {folder / ADAPTER_FILE} says {name!r} where base_model_name_or_path should "
            "name the model that the adapter belongs on; write its folder or hub name there"
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


def untie(model: Any) -> None:
    """Say in a merged model's config that embedding and head are two matrices, where an adapter has
    trained them apart: files that call them tied would lose one of them.
    """
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if torch.equal(embedding.weight, head.weight):
        return
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False


def _config(folder: Path, field: str) -> dict[str, Any]:
    """adapter_config.json as an object of a kind that peft knows. Raises ModelError."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    file = folder / ADAPTER_FILE
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
