"""The registry: one line per objective feeds exports, recipes, suggestions and `alignkit.losses`. Imports no torch."""

# name -> module:Class:function,...
OBJECTIVES: dict[str, str] = {
    "sft": "sft:SFT:sft_loss",
    "dpo": "dpo:DPO:dpo_loss",
    "ipo": "ipo:IPO:ipo_loss",
    "fdpo": "fdpo:FDPO:fdpo_loss",
    "hdpo": "hdpo:HDPO:hdpo_loss",
    "tdpo": "tdpo:TDPO:tdpo_loss",
    "radpo": "radpo:RaDPO:radpo_loss",
    "robust_dpo": "robust:RobustDPO:robust_dpo_loss",
    "hinge": "hinge:Hinge:hinge_loss",
    "kto": "kto:KTO:kto_loss",
    "simpo": "simpo:SimPO:simpo_loss",
    "slic": "slic:SLiC:slic_loss",
    "orpo": "orpo:ORPO:orpo_loss",
    "sampo": "sampo:SamPO:",
    "lddpo": "lddpo:LDDPO:",
    "aot": "aot:AOT:aot_loss",
    "dpkd": "dpkd:DPKD:dpkd_loss",
    "fsft": "fsft:FSFT:fsft_loss",
    "typo": "typo:TYPO:typo_loss",
    "alol": "alol:ALoL:alol_loss",
    "hypo": "hypo:HyPO:sampled_kl_loss",
    "d2o": "d2o:D2O:d2o_loss",
    "treg": "treg:TREG:treg_loss",
    "drpo": "drpo:DRPO:drpo_loss",
    "accelerated_po": "accelerated_po:AcceleratedPO:",
    "reward_model": "reward_model:PlackettLuce:plackett_luce_loss",
    "preference_model": "preference_model:PreferenceModel:",
    "kl_ppo": "kl_ppo:KLPPO:ppo_loss,value_loss",
    "rpg": "rpg:RPG:rpg_loss",
    "grpo": "grpo:GRPO:grpo_loss",
    "rloo": "rloo:RLOO:rloo_loss",
    "dr_grpo": "dr_grpo:DrGRPO:",
    "reinforce_plus_plus": "reinforce_plus_plus:ReinforcePlusPlus:",
    "dapo": "dapo:DAPO:",
    "gspo": "gspo:GSPO:gspo_loss",
    "cispo": "cispo:CISPO:cispo_loss",
    "nash_md": "nash_md:NashMD:nash_md_loss",
    "online_ipo": "online_ipo:OnlineIPO:online_ipo_loss",
    "ipo_md": "ipo_md:IPOMD:",
    "egpo": "egpo:EGPO:",
    "nash_mp": "nash_mp:NashMP:",
    "nash_ema": "nash_ema:NashEMA:",
    "inpo": "inpo:INPO:",
    "sppo": "sppo:SPPO:sppo_loss",
    "rspo": "rspo:RSPO:divergence_loss",
    "onpo": "onpo:ONPO:",
    "online_dpo": "online_dpo:OnlineDPO:",
    "xpo": "xpo:XPO:",
}


def locate(name: str) -> tuple[str, str, str]:
    """Module path, class name and comma-separated function names (may be empty) of a built-in objective."""
    module, cls, function = (OBJECTIVES[name] + "::").split(":")[:3]
    return f"alignkit.objectives.{module}", cls, function
