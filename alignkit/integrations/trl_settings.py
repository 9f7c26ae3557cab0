"""TRL's settings that belong to its own losses, and what takes their place here. Imports no trl."""

from typing import Any

# The objective has its own settings, so a value other than the default would change nothing.
# Setting of DPOConfig or GRPOConfig -> what to use instead; empty where alignkit has nothing alike.
OWN_LOSS = {
    # DPOTrainer
    "label_smoothing": "RobustDPO, EXOPair or AOT with label_smoothing",
    "f_divergence_type": "FDPO(divergence=...)",
    "f_alpha_divergence_coef": "FDPO(divergence='alpha', alpha=...)",
    "ld_alpha": "LDDPO(alpha=...)",
    "loss_weights": "Weighted(parts=[(objective, weight), ...]) of alignkit.objectives.base",
    "use_weighting": "weighting='wpo'",
    "discopop_tau": "DiscoPOP(discopop_tau=...)",
    # GRPOTrainer
    "epsilon": "the objective's clip_low and clip_high",
    "epsilon_high": "the objective's clip_high",
    "delta": "the objective's dual_clip",
    "importance_sampling_level": "GSPO",
    "top_entropy_quantile": "",
    "entropy_coef": "GRPO(entropy_weight=...)",
    "use_adaptive_entropy": "",
    "off_policy_mask_threshold": "GRPO(off_policy_threshold=...)",
    "use_bias_correction_kl": "GRPO(kl='k3_weighted')",
    "sapo_temperature_neg": "SAPO(temperature_negative=...)",
    "sapo_temperature_pos": "SAPO(temperature_positive=...)",
    "vespo_k_pos": "VESPO(power_positive=...)",
    "vespo_lambda_pos": "VESPO(decay_positive=...)",
    "vespo_k_neg": "VESPO(power_negative=...)",
    "vespo_lambda_neg": "VESPO(decay_negative=...)",
}
# Loss type of TRL -> the objective with that loss.
LOSS_TYPES = {
    "sigmoid": "DPO",
    "hinge": "Hinge",
    "ipo": "IPO(form='mean')",
    "exo_pair": "EXOPair",
    "nca_pair": "NCAPair",
    "robust": "RobustDPO",
    "bco_pair": "BCOPair",
    "sppo_hard": "SPPOHard",
    "aot": "AOT",
    "aot_unpaired": "AOT(form='unpaired')",
    "apo_zero": "APOZero",
    "apo_down": "APODown",
    "discopop": "DiscoPOP",
    "sigmoid_norm": "SigmoidNorm",
    "sft": "SFT",
    "grpo": "GRPO",
    "bnpo": "GRPO(aggregation='token_mean')",
    "dr_grpo": "DrGRPO",
    "dapo": "DAPO(drop_constant=False)",
    "cispo": "CISPO",
    "sapo": "SAPO",
    "luspo": "LUSPO",
    "vespo": "VESPO",
}


def instead(setting: str, value: Any) -> str:
    """What to use instead of a `setting` of TRL's own losses that has `value`, as a clause."""
    place = OWN_LOSS.get(setting, "")
    if setting == "loss_type":
        names = value if isinstance(value, list) else [value]
        places = [LOSS_TYPES.get(name, "") for name in names]
        place = " and ".join(places) if all(places) else ""
        if len(places) > 1 and place:
            place = f"a Weighted list of {place} (alignkit.objectives.base.Weighted)"
    if not place:
        return f"no objective of alignkit has {setting}={value!r}: use TRL's own trainer for it"
    return f"instead of {setting} use {place}"
