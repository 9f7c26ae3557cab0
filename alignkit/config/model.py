"""The recipe's `model`, `reference` and `target` sections. Imports pydantic alone."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from alignkit.config.adapter_kinds import ADAPTER_FILE, check_kind, why_unfit
from alignkit.config.section import Section
from alignkit.errors import ModelError

REWARD_HEAD = "reward_head.safetensors"  # beside the language model that it was trained on


class AdapterConfig(Section):
    """An adapter through peft: LoRA, or what `peft` says."""

    r: PositiveInt = Field(16, description="rank")
    alpha: PositiveInt = Field(32, description="scaling numerator: updates are scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: str | list[str] = Field(
        "all-linear", description="module names, or all-linear as in peft"
    )
    path: str | None = Field(
        None, description="a pretrained adapter to train further; the reference is this adapter"
    )
    peft: dict[str, Any] | None = Field(
        None,
        description="further settings of peft's config under peft's names, such as use_dora, "
        "use_rslora, modules_to_save, bias, target_parameters; peft_type for another kind than LORA",
    )

    @field_validator("peft")
    @classmethod
    def _can_be_trained(cls, peft: dict[str, Any] | None) -> dict[str, Any] | None:
        why = why_unfit(peft or {}, "begun")
        if why is not None:
            raise ValueError(why)
        return peft

    @model_validator(mode="after")
    def _path_alone(self) -> Self:
        if self.path is not None and self.peft:
            raise ValueError("an adapter at a path has its own settings; leave `peft` out")
        return self


class ModelConfig(Section):
    """Which model is trained and how it is loaded."""

    name_or_path: str = Field(
        "task", description="a hub name, a local folder, or `task` for the embedded world's base"
    )
    revision: str | None = Field(None, description="hub revision; pin it for repeatable runs")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="dtype of the weights"
    )
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the saved model; auto: that of the base model's files"
    )
    attention: Literal["auto", "eager", "sdpa", "flex_attention"] = Field(
        "auto", description="attention kernel"
    )
    layout: Literal["auto", "shared_prefix", "padded"] = Field(
        "auto", description="how bundles become rows; auto tries both layouts once"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute layers in backward to save memory"
    )
    adapter: AdapterConfig | None = Field(
        None, description="train a LoRA adapter instead of all weights"
    )
    quantize: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="load the base in 8 or 4 bits under a trained adapter; needs bitsandbytes (8bit: "
        "or torchao)",
    )
    add_tokens: list[str] = Field(
        [],
        description="new tokens for the tokenizer; their embeddings begin at the mean of the others",
    )
    trust_remote_code: bool = Field(False, description="run Python code that ships with the model")

    @model_validator(mode="after")
    def _quantized_base(self) -> Self:
        """A base in few bits needs a package, and an adapter that can be trained."""
        if self.quantize == "none":
            return self
        packages = ["bitsandbytes", "torchao"] if self.quantize == "8bit" else ["bitsandbytes"]
        if not any(find_spec(package) for package in packages):
            raise ValueError(
                f"quantize {self.quantize} needs the package {' or '.join(packages)}, which is not "
                "installed; install it, or leave quantize out"
            )
        if self.adapter is None:
            raise ValueError(
                f"quantize {self.quantize} loads weights that cannot be trained; set "
                "model.adapter.r=16 to train an adapter on them"
            )
        return self

    @model_validator(mode="after")
    def _new_tokens(self) -> Self:
        """Embeddings of new tokens are trained with the whole model."""
        if self.add_tokens and self.adapter is not None:
            raise ValueError(
                "add_tokens makes new rows of the embedding, which an adapter's folder cannot keep; "
                "train the whole model, or add the tokens to the base model first"
            )
        doubled = {token for token in self.add_tokens if self.add_tokens.count(token) > 1}
        if doubled or "" in self.add_tokens:
            raise ValueError(f"add_tokens has empty or doubled tokens: {sorted(doubled)}")
        return self


class TargetConfig(Section):
    """A second anchor for the objectives that ask for one."""

    kind: Literal["ema", "synced"] = Field(
        "ema", description="how the anchor follows the policy: by an average, or by copies"
    )
    decay: float = Field(0.99, gt=0, lt=1, description="ema: weight of the old anchor in each step")
    every: PositiveInt = Field(64, description="synced: steps between two copies of the policy")


class ReferenceConfig(TargetConfig):
    """Which policy anchors the KL."""

    kind: str = Field(  # type: ignore[assignment]
        "auto", description="auto, frozen, adapter_off, cached, ema, synced, or a path to a model"
    )
    store: str | None = Field(
        None,
        description="cached: a folder that keeps the log-probs for later runs on the same rows",
    )


def check_adapter(path: str) -> None:
    """ModelError for a `model.adapter.path` that holds no adapter, or none that can be trained."""
    folder = Path(path).expanduser()
    if not (folder / ADAPTER_FILE).is_file():
        raise ModelError(
            f"model.adapter.path: there is no {ADAPTER_FILE} in {path}; give a folder written by peft"
        )
    check_kind(folder, "model.adapter.path", "continued")


def _holds_model(folder: Path) -> bool:
    return any((folder / file).exists() for file in ("config.json", ADAPTER_FILE))


def check_source(name: str, field: str = "model.name_or_path") -> None:
    """ModelError for a path that holds no model, or an adapter that cannot be used; names on the hub
    are left to the hub.
    """
    path = Path(name).expanduser()
    if path.is_file():
        raise ModelError(
            f"{field}: {name} is a file; give the folder that holds config.json, or a hub name"
        )

    if path.is_dir():
        if not _holds_model(path):
            inside = path / "model"
            place = inside if _holds_model(inside) else "a folder written by save_pretrained"
            raise ModelError(f"{field}: the folder {name} holds no config.json; give {place}")
        check_kind(path, field)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"{field}: there is no folder {name}; check the path, or give a hub name such as "
            "Qwen/Qwen3-0.6B"
        )


def check_reward_model(name: str, field: str) -> None:
    """As `check_source`; and ModelError for a folder that holds a language model without a head for
    rewards, which would get one of random numbers.
    """
    check_source(name, field)
    folder = Path(name).expanduser()
    file = folder / "config.json"
    if not file.is_file() or (folder / REWARD_HEAD).exists():
        return
    try:
        architectures = json.loads(file.read_text(encoding="utf-8")).get("architectures") or [""]
    except (ValueError, AttributeError):  # said by the loader, in its words
        return
    if str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel")):
        raise ModelError(
            f"{field}: {name} is a language model, and no reward model; `alignkit train reward_model` "
            "makes one of it"
        )
