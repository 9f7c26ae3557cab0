"""TRL's settings that belong to its own losses: which objective says the same, and what takes their
place. Imports no trl.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from alignkit.objectives.base import Objective


class Setting(NamedTuple):
    """A setting of DPOConfig or GRPOConfig that TRL's own losses read."""

    instead: str = ""  # what to use in its place; empty where alignkit has nothing alike
    field: str = ""  # of the objectives that say the same under this name, where there is one


# The objective has its own settings, so a value that says something else would change nothing.
OWN_LOSS = {
    # DPOTrainer
    "label_smoothing": Setting("RobustDPO, EXOPair or AOT with label_smoothing", "label_smoothing"),
    "f_divergence_type": Setting("FDPO(divergence=...)"),
    "f_alpha_divergence_coef": Setting("FDPO(divergence='alpha', alpha=...)"),
    "ld_alpha": Setting("LDDPO(alpha=...)"),
    "loss_weights": Setting(
        "Weighted(parts=[(objective, weight), ...]) of alignkit.objectives.base"
    ),
    "use_weighting": Setting("weighting='wpo'"),
    "discopop_tau": Setting("DiscoPOP(discopop_tau=...)", "discopop_tau"),
    # GRPOTrainer
    "epsilon": Setting("the objective's clip_low and clip_high", "clip_low"),
    "epsilon_high": Setting("the objective's clip_high", "clip_high"),
    "delta": Setting("the objective's dual_clip", "dual_clip"),
    "importance_sampling_level": Setting(
        "GSPO, or ratio='sequence' of GRPO, its relatives or CISPO"
    ),
    "top_entropy_quantile": Setting(),
    "entropy_coef": Setting("the objective's entropy_weight", "entropy_weight"),
    "use_adaptive_entropy": Setting(),
    "off_policy_mask_threshold": Setting(
        "the objective's off_policy_threshold", "off_policy_threshold"
    ),
    "use_bias_correction_kl": Setting("GRPO(kl='k3_weighted')"),
    "sapo_temperature_neg": Setting("SAPO(temperature_negative=...)", "temperature_negative"),
    "sapo_temperature_pos": Setting("SAPO(temperature_positive=...)", "temperature_positive"),
    "vespo_k_pos": Setting("VESPO(power_positive=...)", "power_positive"),
    "vespo_lambda_pos": Setting("VESPO(decay_positive=...)", "decay_positive"),
    "vespo_k_neg": Setting("VESPO(power_negative=...)", "power_negative"),
    "vespo_lambda_neg": Setting("VESPO(decay_negative=...)", "decay_negative"),
}
# Loss type of TRL -> the class with that loss.
LOSS_TYPES = {
    "sigmoid": "DPO",
    "hinge": "Hinge",
    "ipo": "IPO",
    "exo_pair": "EXOPair",
    "nca_pair": "NCAPair",
    "robust": "RobustDPO",
    "bco_pair": "BCOPair",
    "sppo_hard": "SPPOHard",
    "aot": "AOT",
    "aot_unpaired": "AOT",
    "apo_zero": "APOZero",
    "apo_down": "APODown",
    "discopop": "DiscoPOP",
    "sigmoid_norm": "SigmoidNorm",
    "sft": "SFT",
    "grpo": "GRPO",
    "bnpo": "GRPO",
    "dr_grpo": "DrGRPO",
    "dapo": "DAPO",
    "cispo": "CISPO",
    "sapo": "SAPO",
    "luspo": "LUSPO",
    "vespo": "VESPO",
}
# The fields in which it differs from the class's defaults, where it does.
LOSS_FIELDS: dict[str, dict[str, Any]] = {
    "ipo": {"form": "mean"},
    "aot_unpaired": {"form": "unpaired"},
    "bnpo": {"aggregation": "token_mean"},
    "dapo": {"drop_constant": False},
}
FORMS = ("form", "aggregation", "drop_constant")  # fields that make another loss of an objective
# The objectives with one importance ratio for each completion, whatever the level: VESPO's loss in
# TRL does not read it.
PER_SEQUENCE = ("GSPO", "LUSPO", "VESPO")
# The losses that TRL sums over tokens.
TOKEN_SUMS = ("bnpo", "dr_grpo", "dapo", "cispo")
BY_LENGTH = (
    "with importance_sampling_level='sequence' loss_type={!r} weights each sequence by its "
    "completion length"
)


def per_sequence(config: Any) -> bool:
    """Whether the arguments ask for one importance ratio for each completion."""
    return getattr(config, "importance_sampling_level", "token") == "sequence"


def has_one_ratio(objective: Objective) -> bool:
    """Whether the objective has one importance ratio for each completion."""
    of_its_own = type(objective).__name__ in PER_SEQUENCE
    return of_its_own or getattr(objective, "ratio", "token") == "sequence"


def says_the_same(setting: str, config: Any, objective: Objective) -> bool:
    """Whether the arguments' value of a `setting` of `OWN_LOSS`, or of `loss_type`, is what the
    objective does anyway.
    """
    value = getattr(config, setting)
    name = type(objective).__name__
    if setting == "loss_type":
        given = value if isinstance(value, list) else [value]
        return len(given) == 1 and _is_loss_type(given[0], config, objective)

    if setting == "epsilon_high" and name == "CISPO":  # TRL's is the largest weight itself
        clip = getattr(objective, "clip_high", None)
        return clip is not None and value == 1 + clip
    special = {
        "ld_alpha": name == "LDDPO" and value == getattr(objective, "alpha", None),
        "use_weighting": value and getattr(objective, "weighting", None) == "wpo",
        "importance_sampling_level": value == "sequence" and has_one_ratio(objective),
        "use_bias_correction_kl": value == (getattr(objective, "kl", None) == "k3_weighted"),
    }
    if setting in special:
        return bool(special[setting])
    field = OWN_LOSS[setting].field
    return bool(field) and value == getattr(objective, field, None)


def _is_loss_type(loss_type: str, config: Any, objective: Objective) -> bool:
    """Whether the objective is TRL's loss of that name under the arguments."""
    name = LOSS_TYPES.get(loss_type, "")
    fields = LOSS_FIELDS.get(loss_type, {})
    if loss_type == "grpo" and per_sequence(config) and not hasattr(objective, "ratio"):
        name = "GSPO"
    if name != type(objective).__name__:
        return False
    if (
        loss_type == "dr_grpo"
        and getattr(objective, "length", None) != config.max_completion_length
    ):
        return False
    declared = type(objective).model_fields
    return all(
        getattr(objective, field) == fields.get(field, declared[field].default)
        for field in FORMS
        if field in declared
    )


def instead(setting: str, config: Any) -> str:
    """What to use instead of the arguments' value of a `setting` of TRL's own losses, as a clause."""
    value = getattr(config, setting)
    if setting == "loss_type":
        names = value if isinstance(value, list) else [value]
        place = _per_sequence(names, config) if per_sequence(config) else _objectives(names, config)
    else:
        place = OWN_LOSS[setting].instead
    if not place:
        return f"no objective of alignkit has {setting}={value!r}: use TRL's own trainer for it"
    return f"instead of {setting} use {place}"


def _objectives(loss_types: Sequence[str], config: Any) -> str:
    """The objectives with these losses; empty where one of them has none."""
    if not all(name in LOSS_TYPES for name in loss_types):
        return ""
    place = " and ".join(_written(loss_type, config) for loss_type in loss_types)
    if len(loss_types) > 1:
        return f"a Weighted list of {place} (alignkit.objectives.base.Weighted)"
    return place


def _written(loss_type: str, config: Any, **further: Any) -> str:
    """The objective with this loss, as Python writes it; `further` are fields of it."""
    name = LOSS_TYPES[loss_type]
    fields = LOSS_FIELDS.get(loss_type, {})
    if loss_type == "dr_grpo":
        fields = {"length": config.max_completion_length}
    written = ", ".join(f"{field}={value!r}" for field, value in {**fields, **further}.items())
    return f"{name}({written})" if written else name


def _per_sequence(loss_types: Sequence[str], config: Any) -> str:
    """The objectives with these losses and one importance ratio for each completion."""
    loss_type = loss_types[0]
    if loss_type in TOKEN_SUMS:
        return (
            f"{_written(loss_type, config, ratio='sequence')}, where its length weighs a "
            f"completion ({BY_LENGTH.format(loss_type)}), or GSPO with loss_type='grpo', where "
            "every completion counts alike"
        )
    return {"luspo": "LUSPO", "grpo": "GSPO", "vespo": "VESPO"}.get(loss_type, "")
