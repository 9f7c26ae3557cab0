"""Side by side with TRL's DPOTrainer: same weights, same rows in the same order, the same losses
and gradient norms.
"""

import itertools
import json

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from alignkit.config.data import DataConfig
from alignkit.config.model import AdapterConfig, ModelConfig, ReferenceConfig
from alignkit.config.train import TrainConfig
from alignkit.data.load import load_bundles
from alignkit.files import read_jsonl
from alignkit.objectives.preference.dpo import DPO
from alignkit.policies.load import load_pair
from alignkit.sources.dataset import DatasetSource
from alignkit.training.job import Job
from alignkit.training.loop import train
from alignkit.training.run_folder import RunFolder

STEPS, BATCH, RATE = 20, 2, 2e-5


class InOrder(DPOTrainer):
    """TRL's trainer over the rows in file order."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def trl_run(model, rows, out, accumulation, lora):
    torch.manual_seed(0)
    args = DPOConfig(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=BATCH // accumulation,
        gradient_accumulation_steps=accumulation, learning_rate=RATE, lr_scheduler_type="constant", beta=0.1, max_length=512,
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
        max_grad_norm=1.0, disable_tqdm=True, seed=0, optim="adamw_torch",
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(model)
    adapter = (
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        if lora
        else None
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = InOrder(
        policy,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    start = {k: v.detach().clone() for k, v in trainer.model.named_parameters() if v.requires_grad}
    trainer.train()
    return [
        (r["loss"], r["grad_norm"]) for r in trainer.state.log_history if "grad_norm" in r
    ], start


@pytest.mark.long
@pytest.mark.parametrize(("accumulation", "lora"), [(1, False), (2, False), (1, True)])
def test_losses_and_gradient_norms_equal_trl(shared, tmp_path, accumulation, lora):
    model = shared / "stories260k"
    with (shared / "gsm8k" / "preferences_train.jsonl").open() as file:
        rows = [{k: v for k, v in json.loads(line).items() if k != "problem"} for line in file]
    # short ones: sums of float32 log-probs beyond -1000 differ by more than 1e-5 whoever adds them
    rows = list(
        itertools.islice((r for r in rows if len(r["chosen"] + r["rejected"]) < 250), STEPS * BATCH)
    )
    expected, start = trl_run(model, rows, tmp_path / "trl", accumulation, lora)

    objective = DPO(beta=0.1)
    adapter = AdapterConfig(r=8, alpha=16) if lora else None
    config = TrainConfig(
        steps=STEPS,
        batch_size=BATCH,
        learning_rate=RATE,
        warmup_steps=0,
        schedule="constant",
        save_every=0,
    )
    settings = ModelConfig(name_or_path=str(model), adapter=adapter)
    pair = load_pair(
        settings,
        ReferenceConfig(kind="auto"),
        None,
        objective.plan,
        device="cpu",
        fixed_data=False,
        seed=0,
    )
    ours = {name: p for name, p in pair.base.model.named_parameters() if p.requires_grad}
    assert len(ours) == len(start)
    with torch.no_grad():  # adapters begin at random
        for name, value in start.items():
            ours[name].copy_(value)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = DataConfig(train=str(tmp_path / "rows.jsonl"), max_length=512)
    bundles, _ = load_bundles(data, "pair", pair.tokenizer)
    source = DatasetSource(bundles, objective.plan, BATCH, seed=0, shuffle=False)
    with RunFolder(tmp_path / "run") as run:
        budget = 4096 // accumulation
        train(
            Job(
                objective,
                pair,
                source,
                config,
                run,
                Accelerator(cpu=True),
                STEPS,
                micro_batch_tokens=budget,
            )
        )
    found = [(r["loss"], r["grad_norm"]) for r in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert len(bundles) == len(rows)
    # Adam spreads the rounding of the first steps; how far depends on the processor.
    assert torch.tensor(found) == pytest.approx(torch.tensor(expected), abs=1e-5, rel=2e-5)
