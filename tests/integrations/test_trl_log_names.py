"""What TRL logs of its own losses on rollouts: the adapter logs the same values under the same names."""

import inspect
from dataclasses import fields

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer
from trl_world import grpo_trainer

from alignkit.integrations.trl import as_trl_trainer
from alignkit.objectives.online.cispo import CISPO
from alignkit.objectives.online.dapo import DAPO
from alignkit.objectives.online.dr_grpo import DrGRPO
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.online.gspo import GSPO
from alignkit.objectives.online.luspo import LUSPO
from alignkit.objectives.online.rpg import RPG
from alignkit.objectives.online.sapo import SAPO
from alignkit.objectives.online.vespo import VESPO

# Narrow, so that the second step on a rollout is clipped.
TIGHT = {"clip_low": 0.01, "clip_high": 0.02}
NARROW = {"epsilon": 0.01, "epsilon_high": 0.02}
SEQUENCE = {"importance_sampling_level": "sequence"}
# The objective, TRL's settings for the same loss, and names that must be among what it logs.
CASES = {
    "grpo": (GRPO(beta=0, **TIGHT), {"loss_type": "grpo", **NARROW}, ("clip_ratio/low_min",)),
    "k3": (
        GRPO(beta=0.1, kl="k3", **TIGHT),
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False, **NARROW},
        ("kl", "clip_ratio/high_max"),
    ),
    "k3_weighted": (
        GRPO(beta=0.1, **TIGHT),
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True, **NARROW},
        ("kl",),
    ),
    "entropy": (
        GRPO(beta=0.1, kl="k3", entropy_weight=0.3),
        {
            "loss_type": "grpo",
            "beta": 0.1,
            "use_bias_correction_kl": False,
            "entropy_coef": 0.3,
        },
        ("policy_loss", "entropy_coef"),
    ),
    "dr_grpo": (
        DrGRPO(length=5, entropy_weight=0.5, **TIGHT),
        {"loss_type": "dr_grpo", "scale_rewards": "none", "entropy_coef": 0.5, **NARROW},
        ("policy_loss", "clip_ratio/region_mean"),
    ),
    "dapo": (
        DAPO(drop_constant=False, entropy_weight=0.5, **TIGHT),
        {"loss_type": "dapo", "entropy_coef": 0.5, **NARROW},
        ("policy_loss", "clip_ratio/low_mean"),
    ),
    "bnpo": (
        GRPO(beta=0, aggregation="token_mean", **TIGHT),
        {"loss_type": "bnpo", **NARROW},
        ("clip_ratio/high_mean",),
    ),
    "gspo": (
        GSPO(entropy_weight=0.5, off_policy_threshold=1e-3, **TIGHT),
        {
            "loss_type": "grpo",
            "entropy_coef": 0.5,
            "off_policy_mask_threshold": 1e-3,
            **NARROW,
            **SEQUENCE,
        },
        ("policy_loss", "clip_ratio/low_min", "clip_ratio/high_mean"),
    ),
    "dapo per completion": (
        DAPO(drop_constant=False, ratio="sequence", **TIGHT),
        {"loss_type": "dapo", **NARROW, **SEQUENCE},
        ("clip_ratio/high_mean", "clip_ratio/low_min", "clip_ratio/region_mean"),
    ),
    "cispo per completion": (
        CISPO(ratio="sequence", clip_high=0.001),
        {"loss_type": "cispo", "epsilon_high": 1.001, **SEQUENCE},
        ("cispo_clip_ratio",),
    ),
    "luspo": (
        LUSPO(entropy_weight=0.5, **TIGHT),
        {"loss_type": "luspo", "entropy_coef": 0.5, **NARROW, **SEQUENCE},
        ("policy_loss", "clip_ratio/high_max"),
    ),
    "cispo": (
        CISPO(clip_high=0.02, entropy_weight=0.5),
        {"loss_type": "cispo", "entropy_coef": 0.5, "epsilon_high": 1.02},
        ("policy_loss", "cispo_clip_ratio"),
    ),
    "vespo": (
        VESPO(entropy_weight=0.5, off_policy_threshold=1e-3),
        {"loss_type": "vespo", "entropy_coef": 0.5, "off_policy_mask_threshold": 1e-3},
        ("policy_loss", "vespo/phi_seq_mean"),
    ),
    "sapo": (
        SAPO(entropy_weight=0.5, off_policy_threshold=1e-3),
        {"loss_type": "sapo", "entropy_coef": 0.5, "off_policy_mask_threshold": 1e-3},
        ("policy_loss",),
    ),
}


def run(cls, folder, out, settings):
    """The rows of two steps on one rollout and of an evaluation."""
    common = {
        "num_iterations": 2,
        "max_steps": 2,
        "learning_rate": 0.01,
        "per_device_eval_batch_size": 32,  # all of them: TRL averages the averages of batches
    }
    trainer = grpo_trainer(cls, folder, out, **{**common, **settings})
    trainer.train()
    torch.manual_seed(5)
    trainer.evaluate()
    return [row for row in trainer.state.log_history if {"loss", "eval_loss"} & row.keys()]


# Older releases log the share of a whole batch under these names.
EXTREMES = ("clip_ratio/low_min", "clip_ratio/high_max")
OF_COMPLETIONS = "masked_seq_mean" in inspect.getsource(inspect.getmodule(GRPOTrainer))


def known_here(settings):
    """Whether this release of TRL has these settings and this loss."""
    source = inspect.getsource(inspect.getmodule(GRPOTrainer))
    names = {field.name for field in fields(GRPOConfig)}
    return settings.keys() <= names and f'"{settings["loss_type"]}"' in source


@pytest.mark.parametrize("name", CASES)
def test_every_name_has_trls_value(model, tmp_path, name):
    """The arguments stay in the script as they were: they say what the objective does."""
    objective, settings, named = CASES[name]
    if not known_here(settings):
        pytest.skip("this release of TRL has no such loss or setting")
    theirs = run(GRPOTrainer, model, tmp_path, settings)
    ours = run(as_trl_trainer(objective, GRPOTrainer), model, tmp_path, settings)
    assert len(theirs) == len(ours) == 3
    assert set(named) <= theirs[1].keys()
    for expected, row in zip(theirs, ours, strict=True):
        timeless = {key for key in expected if "time" not in key and "per_second" not in key}
        assert timeless <= row.keys()
        if not OF_COMPLETIONS:
            timeless = {key for key in timeless if key.removeprefix("eval_") not in EXTREMES}
        assert {key: row[key] for key in timeless} == pytest.approx(
            {key: expected[key] for key in timeless}, rel=1e-5, abs=2e-6
        )
    moving = [key for key in named if key not in ("entropy_coef", "clip_ratio/low_min")]
    assert all(theirs[1][key] != 0 for key in moving)


def test_accumulation_averages_the_micro_batches(model, tmp_path):
    """`policy_loss` and the extremes are those of micro-batches, averaged, as TRL has them."""
    objective, settings, _ = CASES["entropy"]
    if not known_here(settings):
        pytest.skip("this release of TRL has no such setting")
    settings = {**settings, "gradient_accumulation_steps": 2, "steps_per_generation": 2}
    names = ("policy_loss", "entropy_coef", *EXTREMES)
    theirs, ours = (
        run(cls, model, tmp_path, settings)
        for cls in (GRPOTrainer, as_trl_trainer(objective, GRPOTrainer))
    )
    for expected, row in zip(theirs[:2], ours[:2], strict=True):
        for name in names:
            assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=2e-6), name


def test_another_objective_with_one_ratio_per_completion(model, tmp_path):
    """RPG's theorem is about completions: low_mean is their share, and low_min 0 or 1."""
    objective = RPG(anchor="behavior", beta=0.01, clip_low=0.01, clip_high=0.01)
    row = run(as_trl_trainer(objective, GRPOTrainer), model, tmp_path, {})[1]
    assert row["clip_ratio/low_mean"] in (0.25, 0.5, 0.75)
    assert (row["clip_ratio/low_min"], row["clip_ratio/high_max"]) == (0, 1)
