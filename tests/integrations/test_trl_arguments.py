"""Arguments of TRL's own losses: those that say what the objective does anyway are taken, others are
not.
"""

import re
from dataclasses import fields

import pytest
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl_world import dpo_trainer, grpo_trainer

from alignkit.errors import ConfigError
from alignkit.integrations.trl import as_trl_trainer
from alignkit.integrations.trl_checks import TRL_LOG
from alignkit.objectives.online.cispo import CISPO
from alignkit.objectives.online.dapo import DAPO
from alignkit.objectives.online.dr_grpo import DrGRPO
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.online.gspo import GSPO
from alignkit.objectives.online.luspo import LUSPO
from alignkit.objectives.online.sapo import SAPO
from alignkit.objectives.online.vespo import VESPO
from alignkit.objectives.preference.dpo import DPO
from alignkit.objectives.preference.ipo import IPO
from alignkit.objectives.preference.lddpo import LDDPO
from alignkit.objectives.preference.robust import RobustDPO


def skip_unknown(online, settings):
    if not settings.keys() <= {field.name for field in fields(GRPOConfig if online else DPOConfig)}:
        pytest.skip("this release of TRL has no such setting")


# Arguments that say what the objective does anyway: a script may keep them.
SAME = [
    (DPO(weighting="wpo"), {"loss_type": "sigmoid", "use_weighting": True}),
    (IPO(tau=0.1, form="mean"), {"loss_type": "ipo"}),
    (LDDPO(alpha=0.5), {"ld_alpha": 0.5}),
    (RobustDPO(label_smoothing=0.1), {"loss_type": "robust", "label_smoothing": 0.1}),
    (DAPO(drop_constant=False), {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}),
    (DrGRPO(length=5), {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    (CISPO(clip_high=3.0), {"loss_type": "cispo", "epsilon_high": 4.0}),
    (GRPO(beta=0, entropy_weight=0.1, dual_clip=3.0), {"entropy_coef": 0.1, "delta": 3.0}),
    (LUSPO(), {"loss_type": "luspo", "importance_sampling_level": "sequence"}),
    (GSPO(), {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    (
        GRPO(beta=0, ratio="sequence"),
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
]


@pytest.mark.parametrize(("objective", "settings"), SAME, ids=[repr(case[0]) for case in SAME])
def test_arguments_that_say_the_same_are_taken(model, tmp_path, caplog, objective, settings):
    online = objective.plan.data == "rollout"
    skip_unknown(online, settings)
    make, base = (grpo_trainer, GRPOTrainer) if online else (dpo_trainer, DPOTrainer)
    make(as_trl_trainer(objective, base), model, tmp_path, **settings)
    assert not [record for record in caplog.records if record.name == TRL_LOG]


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        (IPO(tau=0.1), {"loss_type": "ipo"}),
        (LDDPO(alpha=0.5), {"ld_alpha": 0.4}),
        (DAPO(drop_constant=False), {"epsilon_high": 0.3}),
        (CISPO(clip_high=3.0), {"epsilon_high": 3.0}),
        (GRPO(beta=0, entropy_weight=0.1), {"entropy_coef": 0.2}),
        (GRPO(beta=0), {"importance_sampling_level": "sequence"}),
        (SAPO(), {"importance_sampling_level": "sequence"}),
        (GSPO(), {"importance_sampling_level": "sequence", "loss_type": "bnpo"}),
        (
            DAPO(drop_constant=False, ratio="sequence"),
            {"importance_sampling_level": "sequence", "loss_type": "bnpo"},
        ),
    ],
)
def test_arguments_that_say_something_else_are_not(model, tmp_path, objective, settings):
    online = objective.plan.data == "rollout"
    make, base = (grpo_trainer, GRPOTrainer) if online else (dpo_trainer, DPOTrainer)
    skip_unknown(online, settings)
    with pytest.raises(ConfigError, match="would change nothing"):
        make(as_trl_trainer(objective, base), model, tmp_path, **settings)


ANNOUNCED = [
    (GSPO(), "dapo", "GSPO counts every completion alike"),  # TRL's default loss type
    (DAPO(drop_constant=False, ratio="sequence"), "dapo", r"so does DAPO\(ratio='sequence'\)"),
    (GRPO(beta=0, ratio="sequence", aggregation="token_mean"), "bnpo", r"so does GRPO\("),
    (DrGRPO(length=5, ratio="sequence"), "dr_grpo", r"so does DrGRPO\("),
    (CISPO(ratio="sequence"), "cispo", r"so does CISPO\("),
]


@pytest.mark.parametrize(
    ("objective", "loss_type", "advice"), ANNOUNCED, ids=[repr(case[0]) for case in ANNOUNCED]
)
def test_a_loss_that_weighs_lengths_is_announced(
    model, tmp_path, caplog, objective, loss_type, advice
):
    """Where TRL announces it, with both settings; and it trains, as TRL does."""
    settings = {"importance_sampling_level": "sequence", "loss_type": loss_type}
    trainer = grpo_trainer(as_trl_trainer(objective, GRPOTrainer), model, tmp_path, **settings)
    (said,) = [record.getMessage() for record in caplog.records if record.name == TRL_LOG]
    assert f"importance_sampling_level='sequence' loss_type='{loss_type}' weights each" in said
    assert re.search(advice, said)
    assert trainer.args.importance_sampling_level == "sequence"


@pytest.mark.parametrize(
    ("objective", "settings", "advice"),
    [
        (VESPO(), {"importance_sampling_level": "sequence", "loss_type": "vespo"}, "leave it out"),
        (LUSPO(), {"loss_type": "luspo"}, "importance_sampling_level='sequence' says so"),
    ],
)
def test_a_level_that_does_not_fit_is_announced(
    model, tmp_path, caplog, objective, settings, advice
):
    skip_unknown(True, settings)
    grpo_trainer(as_trl_trainer(objective, GRPOTrainer), model, tmp_path, **settings)
    (said,) = [record.getMessage() for record in caplog.records if record.name == TRL_LOG]
    assert advice in said
