"""The registry: one line per objective feeds exports, recipes, suggestions and `alignkit.losses`.
Imports no torch.
"""

from difflib import get_close_matches

from alignkit.errors import ConfigError

# name -> module:Class:function,...
OBJECTIVES: dict[str, str] = {
    "sft": "preference.sft:SFT:sft_loss,dft_loss",
    "iq_imitation": "preference.iq_imitation:IQImitation:iq_rewards",
    "dpo": "preference.dpo:DPO:dpo_loss",
    "ipo": "preference.ipo:IPO:ipo_loss",
    "fdpo": "preference.fdpo:FDPO:fdpo_loss",
    "hdpo": "preference.hdpo:HDPO:hdpo_loss",
    "tdpo": "preference.tdpo:TDPO:tdpo_loss",
    "radpo": "preference.radpo:RaDPO:radpo_loss",
    "robust_dpo": "preference.robust:RobustDPO:robust_dpo_loss",
    "hinge": "preference.hinge:Hinge:hinge_loss",
    "kto": "preference.kto:KTO:kto_loss",
    "simpo": "preference.simpo:SimPO:simpo_loss",
    "slic": "preference.slic:SLiC:slic_loss",
    "slic_ranked": "preference.slic_ranked:SLiCRanked:slic_ranked_loss",
    "token_guidance": "preference.token_guidance:TokenGuidance:token_rewards,guided_sft_loss",
    "orpo": "preference.orpo:ORPO:orpo_loss",
    "sampo": "preference.sampo:SamPO:",
    "lddpo": "preference.lddpo:LDDPO:",
    "aot": "preference.aot:AOT:aot_loss",
    "dpkd": "distillation.dpkd:DPKD:dpkd_loss",
    "distill": "distillation.distill:Distill:",
    "pld": "distillation.pld:PLD:",
    "opd": "distillation.opd:OPD:",
    "kdrl": "distillation.kdrl:KDRL:",
    "minillm": "distillation.minillm:MiniLLM:",
    "fsft": "preference.fsft:FSFT:fsft_loss",
    "typo": "preference.typo:TYPO:typo_loss",
    "alol": "preference.alol:ALoL:alol_loss",
    "hypo": "preference.hypo:HyPO:sampled_kl_loss",
    "d2o": "preference.d2o:D2O:d2o_loss",
    "treg": "preference.treg:TREG:treg_loss",
    "drpo": "preference.drpo:DRPO:drpo_loss",
    "apo_zero": "preference.apo:APOZero:apo_zero_loss",
    "apo_down": "preference.apo:APODown:apo_down_loss",
    "exo_pair": "preference.exo_pair:EXOPair:exo_loss",
    "nca_pair": "preference.nca_pair:NCAPair:nca_loss",
    "bco_pair": "preference.bco_pair:BCOPair:bco_loss",
    "discopop": "preference.discopop:DiscoPOP:discopop_loss",
    "sppo_hard": "preference.sppo_hard:SPPOHard:sppo_hard_loss",
    "sigmoid_norm": "preference.sigmoid_norm:SigmoidNorm:sigmoid_norm_loss",
    "accelerated_po": "preference.accelerated_po:AcceleratedPO:",
    "reward_model": "reward.reward_model:PlackettLuce:plackett_luce_loss",
    "preference_model": "reward.preference_model:PreferenceModel:",
    "process_reward": "reward.process_reward:ProcessReward:step_loss",
    "haf_rm": "reward.haf_rm:HAFRM:haf_rm_loss",
    "kl_ppo": "online.kl_ppo:KLPPO:ppo_loss,value_loss",
    "rpg": "online.rpg:RPG:rpg_loss",
    "critical_rpg": "online.critical_rpg:CriticalRPG:",
    "grpo": "online.grpo:GRPO:grpo_loss",
    "gigpo": "online.gigpo:GiGPO:gigpo_advantages",
    "ktae": "online.ktae:KTAE:ktae_values",
    "egsw": "online.egsw:EGSW:egsw_weights",
    "asymmetric_po": "online.asymmetric_po:AsymmetricPO:",
    "raft": "online.raft:RAFT:",
    "rloo": "online.rloo:RLOO:rloo_loss",
    "dr_grpo": "online.dr_grpo:DrGRPO:",
    "reinforce_plus_plus": "online.reinforce_plus_plus:ReinforcePlusPlus:",
    "dapo": "online.dapo:DAPO:",
    "gspo": "online.gspo:GSPO:gspo_loss",
    "cispo": "online.cispo:CISPO:cispo_loss",
    "sapo": "online.sapo:SAPO:sapo_loss",
    "luspo": "online.luspo:LUSPO:",
    "vespo": "online.vespo:VESPO:",
    "trajectory_balance": "online.trajectory_balance:TrajectoryBalance:",
    "fdpg": "online.fdpg:FDPG:",
    "dph": "online.dph:DPH:",
    "bond": "online.bond:BOND:",
    "token_value": "online.token_value:TokenValue:token_value_loss",
    "nash_md": "self_play.nash_md:NashMD:nash_md_loss",
    "online_ipo": "self_play.online_ipo:OnlineIPO:online_ipo_loss",
    "ipo_md": "self_play.ipo_md:IPOMD:",
    "egpo": "self_play.egpo:EGPO:",
    "nash_mp": "self_play.nash_mp:NashMP:",
    "nash_ema": "self_play.nash_ema:NashEMA:",
    "inpo": "self_play.inpo:INPO:",
    "sppo": "self_play.sppo:SPPO:sppo_loss",
    "rspo": "self_play.rspo:RSPO:divergence_loss",
    "onpo": "self_play.onpo:ONPO:",
    "online_dpo": "self_play.online_dpo:OnlineDPO:",
    "xpo": "self_play.xpo:XPO:",
}

# Pure functions without an objective of their own in the registry: name -> module.
FUNCTIONS: dict[str, str] = {
    "wpo_weights": "preference.weighting",
    "on_policy_enough": "exploration",
    "entropic_value_loss": "entropic",
    "distillation_loss": "vocabulary_divergences",
    "constrained_kl": "vocabulary_divergences",
    "pld_loss": "teacher_losses",
    "opd_loss": "teacher_losses",
    "kdrl_loss": "teacher_losses",
    "minillm_advantages": "teacher_losses",
    "dph_loss": "teacher_losses",
    "fdpg_loss": "teacher_losses",
    "trajectory_balance_loss": "teacher_losses",
    "soft_value": "online.token_value",
}


def locate(name: str) -> tuple[str, str, str]:
    """Module path, class name and comma-separated function names
    (may be empty) of a built-in objective.
    """
    module, cls, function = (OBJECTIVES[name] + "::").split(":")[:3]
    return f"alignkit.objectives.{module}", cls, function


def unknown_objective(name: str) -> ConfigError:
    """The error of `alignkit verify` for a name that is not in the registry."""
    near = get_close_matches(name, OBJECTIVES, 1)
    hint = f"did you mean `{near[0]}`? " if near else ""
    return ConfigError(
        f"verify: there is no objective `{name}`; {hint}built in: {', '.join(OBJECTIVES)}; own: module:Class"
    )
