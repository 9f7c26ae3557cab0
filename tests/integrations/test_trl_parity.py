"""Contract with TRL's trainers: the adapter around DPO and GRPO equals TRL's own loss, step by
step.
"""

import itertools

import pytest
import torch
import trl_processes as worker
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import DPOTrainer, GRPOTrainer
from trl_world import STEPS, curve, difference, dpo_trainer, grpo_trainer
from two_processes import on_two_processes

from alignkit.integrations.trl import as_trl_trainer
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.preference.dpo import DPO

LIMIT = 1e-6
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
    record_property("difference", found := difference(ours, native))
    assert found < LIMIT


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


@pytest.mark.parametrize("base", [DPOTrainer, GRPOTrainer])
def test_a_mixture_of_experts_keeps_its_load_balancing_loss(model, tmp_path, base):
    make, ours = (
        (dpo_trainer, as_trl_trainer(DPO(beta=0.1)))
        if base is DPOTrainer
        else (grpo_trainer, grpo(0.0, False))
    )
    if "router_aux_loss_coef" not in ours.config.__dataclass_fields__:
        pytest.skip("this release of TRL adds no load-balancing loss")
    config = Qwen3MoeConfig(
        vocab_size=23, hidden_size=16, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1, num_experts=4,
        num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "experts"
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    for file in model.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    settings = {"max_steps": 2, "accumulation": 2, "router_aux_loss_coef": 0.5}
    theirs = curve(make(base, folder, tmp_path, **settings))
    # 0.5 times the 2 experts that each token is sent to
    assert theirs[0, 0] > 0.9 + (0.6 if base is DPOTrainer else 0)
    assert difference(curve(make(ours, folder, tmp_path, **settings)), theirs, TERMS) < LIMIT


@pytest.fixture(scope="module")
def processes(model, tmp_path_factory):
    """Losses and gradient norms of each case on one process and on two."""
    out = tmp_path_factory.mktemp("processes")
    with on_two_processes(worker.__file__, model, out / "two"):
        alone = worker.run(model, out / "one", 1)
    return alone, worker.load(out / "two")


@pytest.mark.parametrize("case", worker.CASES)
def test_two_processes_give_the_losses_of_one(processes, record_property, case):
    alone, two = (found[case] for found in processes)
    assert len(alone) == STEPS
    size = TERMS if worker.CASES[case].base is GRPOTrainer else 0.0
    record_property("difference", found := difference(two, alone, size))
    assert found < LIMIT
