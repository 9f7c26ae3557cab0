"""`Distill` in TRL's DistillationTrainer: TRL's own losses where both have the same divergence, and
what is refused.
"""

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_world import COMMON, PAIRS
from world import save_model

from alignkit import OPD, Distill, MiniLLM
from alignkit.errors import ConfigError
from alignkit.integrations.trl import as_trl_trainer

if not hasattr(trl, "DistillationTrainer"):
    pytest.skip("this release of TRL has no stable distillation trainer", allow_module_level=True)

from trl import DistillationConfig, DistillationTrainer, DPOTrainer, GRPOTrainer


def losses(cls, folder, teacher, out, **settings):
    """Losses and metrics of a few steps on prompts."""
    args = DistillationConfig(
        **{
            **COMMON,
            "output_dir": str(out),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_completion_length": 5,
            "learning_rate": 1e-2,
            **settings,
        }
    )
    torch.manual_seed(0)
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in PAIRS])
    trainer = cls(
        AutoModelForCausalLM.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(teacher),
        args=args,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    ("beta", "objective"),
    [
        (1.0, Distill(divergence="reverse_kl", share=1.0)),
        (0.3, Distill(divergence="jsd", beta=0.3, share=1.0)),
    ],
    ids=["reverse KL", "JSD"],
)
def test_the_losses_are_trls_own(model, tmp_path, beta, objective):
    teacher = save_model(tmp_path / "teacher", seed=5)
    trls = losses(DistillationTrainer, model, teacher, tmp_path / "trl", beta=beta)
    cls = as_trl_trainer(objective, base=DistillationTrainer)
    ours = losses(cls, model, teacher, tmp_path / "ours")
    assert len(ours) == len(trls) == 4
    for own, wanted in zip(ours, trls):
        assert own["loss"] == pytest.approx(wanted["loss"], abs=2e-6)
        assert own["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
        assert objective.metric in own
    assert ours[-1]["loss"] < ours[0]["loss"]


def test_what_does_not_fit(model, tmp_path):
    for objective in (Distill(), Distill(share=0.5), OPD(), MiniLLM()):
        with pytest.raises(
            ConfigError, match=r"use Distill\(share=1.0, ...\), or `alignkit train`"
        ):
            as_trl_trainer(objective, base=DistillationTrainer)
    for objective, base in ((Distill(), DPOTrainer), (OPD(), GRPOTrainer)):
        with pytest.raises(
            ConfigError, match=r"needs a teacher .*base=DistillationTrainer has one"
        ):
            as_trl_trainer(objective, base=base)

    cls = as_trl_trainer(Distill(share=1.0), base=DistillationTrainer)
    with pytest.raises(ConfigError, match=r"args.beta is 0.5, which would change nothing"):
        losses(cls, model, model, tmp_path / "out", beta=0.5)
