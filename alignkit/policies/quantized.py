"""Weights in 8 or 4 bits, under an adapter that is trained."""

from importlib.util import find_spec
from typing import Any

import torch

from alignkit.config.model import ModelConfig


def quantized(model: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` that load the weights in few bits; none for a model in full."""
    if model.quantize == "none":
        return {}
    place = {"": torch.device(device)}
    if find_spec("bitsandbytes") is None:
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "device_map": place}
    from transformers import BitsAndBytesConfig

    settings: dict[str, Any] = {"load_in_8bit": True}
    if model.quantize == "4bit":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": dtype,
        }
    config = BitsAndBytesConfig(**settings)  # type: ignore[no-untyped-call]
    return {"quantization_config": config, "device_map": place}


def keep_differentiable(loaded: Any) -> None:
    """Stop bitsandbytes from packing 4-bit weights for inference on a CPU, as it does in the first
    pass without gradients: nothing would flow back through them, and no error would say so.
    """
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
