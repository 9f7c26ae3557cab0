"""Contract with TRL's trainers: the adapter around DPO and GRPO equals TRL's own loss, step by
step.
"""

import inspect
import itertools
from dataclasses import fields

import pytest
import torch
import trl_processes as worker
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import DPOTrainer, GRPOConfig, GRPOTrainer
from trl_loss_types import LOSS_TYPES, NAMES
from trl_world import STEPS, curve, difference, dpo_trainer, grpo_trainer
from two_processes import on_two_processes

from alignkit.integrations.trl import as_trl_trainer
from alignkit.objectives.online.cispo import CISPO
from alignkit.objectives.online.dapo import DAPO
from alignkit.objectives.online.dr_grpo import DrGRPO
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.online.gspo import GSPO
from alignkit.objectives.online.luspo import LUSPO
from alignkit.objectives.online.sapo import SAPO
from alignkit.objectives.online.vespo import VESPO
from alignkit.objectives.preference.dpo import DPO

LIMIT = 1e-6
# After an optimiser step the weights differ by rounding already: Adam divides each gradient by its
# own size, so the last bit of a small one is no longer small. Which bits differ depends on the
# processor's vector instructions.
LATER_LIMIT = 3e-6
# GRPO's loss is a sum of advantages of this size that cancel: what is left is rounded as they are
TERMS = 1.0


@pytest.mark.parametrize(
    ("accumulation", "tune", "precompute"),
    list(itertools.product([1, 2], ["full", "new", "pretrained"], [False, True])),
)
def test_dpo_equals_trls_own(model, tmp_path, record_property, accumulation, tune, precompute):
    case = (model, tmp_path, accumulation, tune, precompute)
    native = curve(dpo_trainer(DPOTrainer, *case))
    ours = curve(dpo_trainer(as_trl_trainer(DPO(beta=0.1)), *case))
    assert len(ours) == STEPS
    assert ours[0, 0] == pytest.approx(0.6931472, abs=1e-6)  # the reference is where training began
    assert difference(ours[:1], native[:1]) < LIMIT
    record_property("difference", found := difference(ours, native))
    assert found < LATER_LIMIT


@pytest.mark.parametrize(
    ("objective", "loss_type", "settings"),
    LOSS_TYPES,
    ids=NAMES,
)
def test_pair_losses_equal_trls_loss_types(
    model, tmp_path, record_property, objective, loss_type, settings
):
    source = inspect.getsource(inspect.getmodule(DPOTrainer))
    if f'"{loss_type}"' not in source:
        pytest.skip("this release of TRL has no such loss type")
    if "forward_kl" in settings.values() and "1 - torch.exp" not in source:
        pytest.skip("this release of TRL rounds forward_kl by more than the limit")
    common = {"per_device_train_batch_size": 4, "max_steps": 3}
    theirs = {**common, **settings, "loss_type": loss_type, "beta": 0.3}
    native = curve(dpo_trainer(DPOTrainer, model, tmp_path, **theirs))
    ours = curve(dpo_trainer(as_trl_trainer(objective), model, tmp_path, **common))
    assert len(ours) == common["max_steps"]
    assert ours[:, 1].min() > 1e-3
    assert difference(ours[:1], native[:1]) < LIMIT
    record_property("difference", found := difference(ours, native))
    assert found < LATER_LIMIT


def grpo(beta, corrected):
    return as_trl_trainer(GRPO(beta=beta, kl="k3_weighted" if corrected else "k3"), GRPOTrainer)


@pytest.mark.parametrize(
    ("accumulation", "beta", "corrected"),
    list(itertools.product([1, 2], [0.0, 0.1], [False, True])),
)
def test_grpo_equals_trls_own(model, tmp_path, record_property, accumulation, beta, corrected):
    case = (model, tmp_path, accumulation, beta)
    # two steps on each rollout: in the second, the importance ratio is not 1
    settings = {"steps_per_generation": accumulation, "num_iterations": 2}
    native = curve(grpo_trainer(GRPOTrainer, *case, **settings, use_bias_correction_kl=corrected))
    ours = curve(grpo_trainer(grpo(beta, corrected), *case, **settings))
    assert len(ours) == STEPS
    assert ours[:, 1].abs().max() > 0.01
    record_property("difference", found := difference(ours, native, TERMS))
    assert found < LIMIT


NARROW = {"clip_low": 0.01, "clip_high": 0.02}
PER_COMPLETION = {"importance_sampling_level": "sequence", "epsilon": 0.01, "epsilon_high": 0.02}
# The objective, and TRL's settings for the same loss.
ROLLOUT_LOSSES = [
    (SAPO(temperature_negative=1.5), {"loss_type": "sapo", "sapo_temperature_neg": 1.5}),
    (LUSPO(**NARROW), {"loss_type": "luspo", **PER_COMPLETION}),
    (VESPO(), {"loss_type": "vespo"}),
    (DrGRPO(length=5), {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    (DAPO(drop_constant=False), {"loss_type": "dapo", "epsilon_high": 0.28}),
    (CISPO(clip_high=3.0), {"loss_type": "cispo", "epsilon_high": 4.0}),
    (GRPO(beta=0, aggregation="token_mean"), {"loss_type": "bnpo"}),
    (GSPO(**NARROW), {"loss_type": "grpo", **PER_COMPLETION}),
    (
        GRPO(beta=0, ratio="sequence", aggregation="token_mean", **NARROW),
        {"loss_type": "bnpo", **PER_COMPLETION},
    ),
    (
        DrGRPO(length=5, ratio="sequence", **NARROW),
        {"loss_type": "dr_grpo", "scale_rewards": "none", **PER_COMPLETION},
    ),
    (
        DAPO(drop_constant=False, ratio="sequence", dual_clip=1.05, **NARROW),
        {"loss_type": "dapo", "delta": 1.05, **PER_COMPLETION},
    ),
    (
        CISPO(ratio="sequence", clip_high=0.02),
        {"loss_type": "cispo", **PER_COMPLETION, "epsilon_high": 1.02},
    ),
    (
        GRPO(beta=0.1, ratio="sequence", **NARROW),
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True, **PER_COMPLETION},
    ),
    (
        GRPO(beta=0.1, ratio="sequence", kl="k3", aggregation="token_mean", **NARROW),
        {"loss_type": "bnpo", "beta": 0.1, "use_bias_correction_kl": False, **PER_COMPLETION},
    ),
    (GRPO(beta=0, entropy_weight=0.3), {"loss_type": "grpo", "entropy_coef": 0.3}),
    (
        GRPO(beta=0, off_policy_threshold=1e-3),
        {"loss_type": "grpo", "off_policy_mask_threshold": 1e-3},
    ),
]


@pytest.mark.parametrize(
    ("objective", "theirs"),
    ROLLOUT_LOSSES,
    ids=["-".join(case[1]) + case[1]["loss_type"] for case in ROLLOUT_LOSSES],
)
def test_rollout_losses_equal_trls_loss_types(model, tmp_path, record_property, objective, theirs):
    """In the later steps on a rollout the importance ratio is not 1. They are small, since VESPO's
    weights multiply the rounding of ratios that are far from 1.
    """
    if f'"{theirs["loss_type"]}"' not in inspect.getsource(inspect.getmodule(GRPOTrainer)):
        pytest.skip("this release of TRL has no such loss type")
    if not theirs.keys() <= {field.name for field in fields(GRPOConfig)}:
        pytest.skip("this release of TRL has no such setting")
    settings = {"num_iterations": 3, "learning_rate": 0.002}
    native = curve(grpo_trainer(GRPOTrainer, model, tmp_path, **settings, **theirs))
    ours = curve(grpo_trainer(as_trl_trainer(objective, GRPOTrainer), model, tmp_path, **settings))
    assert ours[:, 1].max() > 0.01
    record_property("difference", found := difference(ours, native, TERMS))
    assert found < LIMIT


@pytest.mark.parametrize("tune", ["new", "pretrained"])
def test_grpo_with_lora_and_masked_completions_equals_trls_own(
    model, tmp_path, record_property, tune
):
    settings = {
        "tune": tune,
        "beta": 0.1,
        "mask_truncated_completions": True,
        "max_completion_length": 20,
    }
    native = curve(
        grpo_trainer(GRPOTrainer, model, tmp_path, **settings, use_bias_correction_kl=False)
    )
    ours = curve(grpo_trainer(grpo(0.1, False), model, tmp_path, **settings))
    assert ours[:, 1].max() > 0.01
    record_property("difference", found := difference(ours, native, TERMS))
    assert found < LIMIT


def test_evaluation_equals_trls_own(model, tmp_path):
    for theirs, ours, make in (
        (DPOTrainer, as_trl_trainer(DPO(beta=0.1)), dpo_trainer),
        (GRPOTrainer, grpo(0.1, True), grpo_trainer),
    ):
        settings = {} if make is dpo_trainer else {"beta": 0.1, "accumulation": 2}
        found = []
        for cls in (theirs, ours):
            own = {"use_bias_correction_kl": True} if cls is GRPOTrainer else {}
            trainer = make(cls, model, tmp_path, **settings, **own, per_device_eval_batch_size=4)
            with torch.no_grad():  # away from the reference
                for parameter in trainer.model.parameters():
                    parameter.mul_(1.1)
            torch.manual_seed(5)
            found.append(trainer.evaluate())
        assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=LIMIT, abs=1e-7)
        assert (
            "eval_rewards/margins"
            if make is dpo_trainer
            else "eval_kl/policy_reference_k3_weighted"
        ) in found[1]


def experts(model, folder):
    """A tiny mixture of experts with the tokenizer of `model`."""
    config = Qwen3MoeConfig(
        vocab_size=23, hidden_size=16, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1, num_experts=4,
        num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    for file in model.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("scale_by_std", [False, True])
def test_evaluation_with_one_completion_per_prompt(model, tmp_path, scale_by_std):
    """The advantages are 0, so that the KL alone is left."""
    losses = []
    objective = GRPO(beta=0.1, kl="k3", scale_by_std=scale_by_std)
    scale = "group" if scale_by_std else "none"
    for cls in (GRPOTrainer, as_trl_trainer(objective, GRPOTrainer)):
        trainer = grpo_trainer(
            cls, model, tmp_path, beta=0.1, num_generations_eval=1, scale_rewards=scale
        )
        with torch.no_grad():  # away from the reference
            for parameter in trainer.model.parameters():
                parameter.mul_(1.1)
        torch.manual_seed(5)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] > 1e-6
    assert losses[1] == pytest.approx(losses[0], rel=LIMIT, abs=1e-9)


@pytest.mark.parametrize("base", [DPOTrainer, GRPOTrainer])
def test_a_mixture_of_experts_keeps_its_load_balancing_loss(model, tmp_path, base):
    make, ours = (
        (dpo_trainer, as_trl_trainer(DPO(beta=0.1)))
        if base is DPOTrainer
        else (grpo_trainer, grpo(0.0, False))
    )
    if "router_aux_loss_coef" not in ours.config.__dataclass_fields__:
        pytest.skip("this release of TRL adds no load-balancing loss")
    folder = experts(model, tmp_path / "experts")
    settings = {"max_steps": 2, "accumulation": 2, "router_aux_loss_coef": 0.5}
    theirs = curve(make(base, folder, tmp_path, **settings))
    # 0.5 times the 2 experts that each token is sent to
    assert theirs[0, 0] > 0.9 + (0.6 if base is DPOTrainer else 0)
    assert difference(curve(make(ours, folder, tmp_path, **settings)), theirs, TERMS) < LIMIT


# What TRL logs about the model rather than about its own loss.
MODEL_METRICS = {
    DPOTrainer: {
        "aux_loss", "entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy", "num_tokens",
    },
    GRPOTrainer: {"aux_loss", "entropy", "num_tokens"},
}  # fmt: skip


@pytest.mark.parametrize("base", [DPOTrainer, GRPOTrainer])
def test_metrics_of_the_model_equal_trls_own(model, tmp_path, base):
    """In training and in evaluation, under the same names."""
    make, ours = (
        (dpo_trainer, as_trl_trainer(DPO(beta=0.1)))
        if base is DPOTrainer
        else (grpo_trainer, grpo(0.0, False))
    )
    folder = experts(model, tmp_path / "experts")
    settings = {"max_steps": 2, "per_device_eval_batch_size": 8}
    if "router_aux_loss_coef" in ours.config.__dataclass_fields__:
        settings["router_aux_loss_coef"] = 0.5
    logs = []
    for cls in (base, ours):
        trainer = make(cls, folder, tmp_path, **settings)
        trainer.train()
        torch.manual_seed(5)
        trainer.evaluate()
        logs.append(
            [row for row in trainer.state.log_history if {"loss", "eval_loss"} & row.keys()]
        )
    for theirs, row in zip(*logs, strict=True):
        prefix = "eval_" * ("eval_loss" in row)
        names = {prefix + name for name in MODEL_METRICS[base]} & theirs.keys()
        assert prefix + "entropy" in names
        assert {name: row.get(name) for name in names} == pytest.approx(
            {name: theirs[name] for name in names}, rel=1e-5, abs=1e-6
        )


@pytest.fixture(scope="module")
def processes(model, tmp_path_factory):
    """Losses and gradient norms of each case on one process and on two."""
    out = tmp_path_factory.mktemp("processes")
    with on_two_processes(worker.__file__, model, out / "two"):
        alone = worker.run(model, out / "one", 1)
    return alone, worker.load(out / "two")


@pytest.mark.long
@pytest.mark.parametrize("case", worker.CASES)
def test_two_processes_give_the_losses_of_one(processes, record_property, case):
    alone, two = (found[case] for found in processes)
    assert len(alone) == STEPS
    size = TERMS if worker.CASES[case].base is GRPOTrainer else 0.0
    record_property("difference", found := difference(two, alone, size))
    assert found < LIMIT
