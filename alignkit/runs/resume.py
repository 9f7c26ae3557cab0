"""What a run keeps of its recipe: every `auto` as it was resolved, and the fields that tell one run
from another.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.config.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

    from alignkit.policies.pair import PolicyPair

# Fields that may change between a checkpoint and its resumption: they decide where, how fast and
# how often, not what.
FREE: dict[str, set[str] | None] = {  # None: the whole section
    "model": {"layout", "gradient_checkpointing"},
    "reference": {"store"},
    "data": {"train", "eval", "format"},  # what is trained on is compared row by row
    "train": {
        "micro_batch_tokens",
        "eval_every",
        "save_every",
        "log_samples_every",
        "keep",
        "shard",
        "max_skipped_steps",
        "process_timeout",
    },
    "rollout": {"url", "start_timeout", "timeout", "max_mismatch"},
    "compare": None,
    "trackers": None,
    "output_dir": None,
}
# Fields whose `auto` is resolved once and then kept with the run; data.append_eos decides for each
# row.
AUTOS = [
    ("model", "dtype"),
    ("model", "attention"),
    ("model", "layout"),
    ("reference", "kind"),
    ("data", "format"),
]
AUTOS += [("train", "micro_batch_tokens"), ("train", "dtype"), ("train", "metric")]


def with_resolved_autos(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with each `auto` replaced by what the run in its output_dir resolved it to, and
    what else is not as it was.
    """
    from alignkit.training.run_folder import compare

    file = Path(recipe.output_dir).expanduser() / "recipe.yaml"
    if not file.is_file():
        return recipe, []
    kept = load_recipe(file)
    recipe = replaced(recipe, kept.model_dump())
    changes = compare(kept.model_dump(mode="json"), recipe.model_dump(mode="json"))
    return recipe, [f"changed since this run began: {'; '.join(changes)}"] if changes else []


def found_autos(
    pair: "PolicyPair", accelerator: "Accelerator", fixed: bool
) -> dict[str, dict[str, Any]]:
    """What each `auto` turned out to be on this machine and model."""
    from alignkit.policies.packing import default_budget, kernel_of

    with pair.model("policy") as model:
        attention = kernel_of(model.config)
    dtype = str(pair.parameters()[0].dtype).removeprefix("torch.")
    return {
        "model": {"dtype": dtype, "attention": attention, "layout": pair.layout},
        "reference": {"kind": "auto" if pair.reference_kind == "none" else pair.reference_kind},
        "train": {
            "dtype": "bfloat16" if accelerator.mixed_precision == "bf16" else "float32",
            "micro_batch_tokens": default_budget(accelerator.device, pair.packing),
            "metric": "eval_loss" if fixed else "eval_reward",
        },
    }


def replaced(recipe: Recipe, found: Mapping[str, Any]) -> Recipe:
    """The recipe with each `auto` that `found` knows replaced."""
    sections: dict[str, dict[str, Any]] = {}
    for section, field in AUTOS:
        if getattr(getattr(recipe, section), field) == "auto" and field in found.get(section, {}):
            sections.setdefault(section, {})[field] = found[section][field]
    return recipe.model_copy(
        update={s: getattr(recipe, s).model_copy(update=fields) for s, fields in sections.items()}
    )


def identity_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what may change between a checkpoint and its resumption."""
    found = recipe.model_dump(
        mode="json", exclude={section for section, fields in FREE.items() if fields is None}
    )
    for section, fields in FREE.items():
        for field in fields or ():
            del found[section][field]
    return found
