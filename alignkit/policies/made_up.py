"""Weights that a checkpoint lacks: transformers makes them up at random and only reports it."""

from collections.abc import Mapping
from typing import Any

from alignkit.errors import ModelError


def check_made_up(
    model: Any, report: Mapping[str, Any], name: str, field: str, *, head: bool
) -> None:
    """ModelError where `from_pretrained`'s loading `report` has weights that were made up.

    `head` says whether those of the head count too: a model that gets a fresh head, or one from
    another file, lacks them as it should. `field` of the recipe names the model, `name`.
    """
    backbone = f"{model.base_model_prefix}."
    made_up = sorted(key for key in report["missing_keys"] if head or key.startswith(backbone))
    if made_up:
        more = f" and {len(made_up) - 3} more" if len(made_up) > 3 else ""
        raise ModelError(
            f"{field}: {name} has no weights for {', '.join(made_up[:3])}{more}, which would be "
            "random numbers; give a folder that holds the whole model"
        )
