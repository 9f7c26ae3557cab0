"""Arguments of TRL's own losses: those that say what the objective does anyway are taken, others are
not.
"""

from dataclasses import fields

import pytest
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl_world import dpo_trainer, grpo_trainer

from alignkit.errors import ConfigError
from alignkit.integrations.trl import as_trl_trainer
from alignkit.objectives.online.cispo import CISPO
from alignkit.objectives.online.dapo import DAPO
from alignkit.objectives.online.dr_grpo import DrGRPO
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.online.gspo import GSPO
from alignkit.objectives.online.luspo import LUSPO
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
]


@pytest.mark.parametrize(("objective", "settings"), SAME, ids=lambda case: type(case).__name__)
def test_arguments_that_say_the_same_are_taken(model, tmp_path, recwarn, objective, settings):
    online = objective.plan.data == "rollout"
    skip_unknown(online, settings)
    make, base = (grpo_trainer, GRPOTrainer) if online else (dpo_trainer, DPOTrainer)
    make(as_trl_trainer(objective, base), model, tmp_path, **settings)
    assert not [w for w in recwarn if "completion length" in str(w.message)]


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        (IPO(tau=0.1), {"loss_type": "ipo"}),
        (LDDPO(alpha=0.5), {"ld_alpha": 0.4}),
        (DAPO(drop_constant=False), {"epsilon_high": 0.3}),
        (CISPO(clip_high=3.0), {"epsilon_high": 3.0}),
        (GRPO(beta=0, entropy_weight=0.1), {"entropy_coef": 0.2}),
        (GRPO(beta=0), {"importance_sampling_level": "sequence"}),
    ],
)
def test_arguments_that_say_something_else_are_not(model, tmp_path, objective, settings):
    online = objective.plan.data == "rollout"
    make, base = (grpo_trainer, GRPOTrainer) if online else (dpo_trainer, DPOTrainer)
    skip_unknown(online, settings)
    with pytest.raises(ConfigError, match="would change nothing"):
        make(as_trl_trainer(objective, base), model, tmp_path, **settings)


@pytest.mark.parametrize(("loss_type", "warned"), [("dapo", True), ("grpo", False)])
def test_a_loss_that_weighs_lengths_is_announced(model, tmp_path, recwarn, loss_type, warned):
    """TRL's default loss type with a ratio per completion is not GSPO."""
    settings = {"importance_sampling_level": "sequence", "loss_type": loss_type}
    grpo_trainer(as_trl_trainer(GSPO(), GRPOTrainer), model, tmp_path, **settings)
    messages = [str(w.message) for w in recwarn if "completion length" in str(w.message)]
    assert len(messages) == warned
    assert all("LUSPO weighs lengths" in message for message in messages)
