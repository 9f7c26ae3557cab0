"""The recipe's `model`, `reference` and `target` sections. Imports pydantic alone."""

from typing import Literal

from pydantic import Field, PositiveInt

from alignkit.config.section import Section


class AdapterConfig(Section):
    """LoRA through peft."""

    r: PositiveInt = Field(16, description="rank")
    alpha: PositiveInt = Field(32, description="scaling numerator: updates are scaled by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: str | list[str] = Field(
        "all-linear", description="module names, or all-linear as in peft"
    )
    path: str | None = Field(
        None, description="a pretrained adapter to train further; the reference is this adapter"
    )


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
    trust_remote_code: bool = Field(False, description="run Python code that ships with the model")


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
