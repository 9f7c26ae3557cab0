"""Which of peft's adapters cannot be computed or trained here, and why. Imports no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from alignkit.errors import ModelError

ADAPTER_FILE = "adapter_config.json"
# Computed alone, trained from its own beginning, or trained further beside a copy of it.
Use = Literal["read", "begun", "continued"]
SUPPORTED = "use LORA or another kind that changes single layers"

# A row's tokens go through the model's layers together with those of other rows, each at its own
# position, and past the code that peft puts around the model. These kinds need something else.
UNREADABLE = {
    **dict.fromkeys(
        (
            "PROMPT_TUNING",
            "MULTITASK_PROMPT_TUNING",
            "P_TUNING",
            "PREFIX_TUNING",
            "CPT",
            "CARTRIDGE",
        ),
        "puts tokens of its own before each row, which moves all positions",
    ),
    "ADAPTION_PROMPT": "puts learned tokens into the attention of the layers",
    "LILY": "weighs its parts by the mean over all tokens of a batch, whatever row they are of",
    "POLY": "asks for the number of a task with each row",
    "SHADOW": "carries a state of its own from layer to layer",
    "XLORA": "runs the whole model twice",
}
UNTRAINABLE = {"ADALORA": "needs calls of its own between the steps"}


def why_unfit(settings: Mapping[str, Any], use: Use) -> str | None:
    """Why an adapter with these settings of peft (peft_type; by default LORA) is not for this use,
    and what to take instead; None where it is.
    """
    kind = settings.get("peft_type") or "LORA"
    kind = str(getattr(kind, "value", kind)).upper()
    reason = UNREADABLE.get(kind) or (UNTRAINABLE.get(kind) if use != "read" else None)
    if reason is not None:
        return f"peft_type {kind} {reason}; {SUPPORTED}"

    if kind == "ADAMSS" and settings.get("use_asa") and use != "read":
        return "use_asa needs calls of its own between the steps; leave it out"
    if settings.get("alora_invocation_tokens"):
        return (
            "alora_invocation_tokens begins the adapter where peft finds these tokens in a row by "
            "itself; use LORA without them"
        )
    if use == "continued" and settings.get("layer_replication"):
        return (
            "layer_replication repeats layers again for the copy of the adapter that the KL is "
            "measured from; merge the adapter first, or train a new one"
        )
    return None


def check_kind(folder: Path, field: str, use: Use = "read") -> None:
    """ModelError for a folder with an adapter that is not for this use (see `why_unfit`). `field` of
    the recipe names it. What cannot be read is left to the loader.
    """
    try:
        settings = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    why = why_unfit(settings, use) if isinstance(settings, dict) else None
    if why is not None:
        raise ModelError(f"{field}: the adapter in {folder} cannot be used here: {why}")
