"""The registry: one line per objective feeds exports, recipes, suggestions and `alignkit.losses`. Imports no torch."""

# name -> module:Class:function
OBJECTIVES: dict[str, str] = {
    "sft": "sft:SFT:sft_loss",
    "dpo": "dpo:DPO:dpo_loss",
    "ipo": "ipo:IPO:ipo_loss",
}


def locate(name: str) -> tuple[str, str, str]:
    """Module path, class name and function name (may be empty) of a built-in objective."""
    module, cls, function = (OBJECTIVES[name] + "::").split(":")[:3]
    return f"alignkit.objectives.{module}", cls, function
