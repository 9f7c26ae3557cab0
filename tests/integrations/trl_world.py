"""What the tests with TRL share: a tiny model, rows, and trainers that differ in their class alone."""

from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, GRPOConfig
from world import save_model

STEPS = 4
COMMON = {
    "max_steps": STEPS, "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    "save_strategy": "no", "disable_tqdm": True, "seed": 3, "learning_rate": 2e-4,
}  # fmt: skip


def words(seed: int, n: int) -> str:
    ids = torch.randint(3, 23, (n,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in ids.tolist())


PAIRS = [
    {
        "prompt": words(i, 2 + i % 4),
        "chosen": " " + words(50 + i, 1 + i % 5),
        "rejected": " " + words(99 + i, 1 + i % 3),
    }
    for i in range(8)
]


def save_models(folder: Path) -> Path:
    """A tiny Llama, and in its `adapter` a LoRA adapter that does something."""
    save_model(folder)
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(
        base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(folder / "adapter")
    return folder


def policy(folder: Path, tune: str):
    base = AutoModelForCausalLM.from_pretrained(folder)
    return (
        PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
        if tune == "pretrained"
        else base
    )


def dpo_trainer(
    cls, folder, out, accumulation=1, tune="full", precompute=False, rows=PAIRS, **settings
):
    args = DPOConfig(
        **{
            **COMMON,
            "output_dir": str(out),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": accumulation,
            "precompute_ref_log_probs": precompute,
            **settings,
        }
    )
    lora = (
        LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        if tune == "new"
        else None
    )
    # a new adapter begins at random, in older releases before the trainer sets its seed
    torch.manual_seed(args.seed)
    data = Dataset.from_list(rows)
    return cls(
        policy(folder, tune), args=args, train_dataset=data, eval_dataset=data, peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip


def letters(completions, **_):
    """A reward that tells completions apart."""
    return [float(text.count("1")) + 0.01 * len(text) for text in completions]


def grpo_trainer(
    cls, folder, out, accumulation=1, beta=0.0, tune="full", rewards=letters, **settings
):
    args = GRPOConfig(
        **{
            **COMMON,
            "output_dir": str(out),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": accumulation,
            "num_generations": 4,
            "max_completion_length": 5,
            "beta": beta,
            "temperature": 0.9,
            "loss_type": "grpo",
            # Adam makes steps of full size from the rounding errors of gradients that cancel
            "optim": "sgd",
            "learning_rate": 0.05,
            **settings,
        }
    )
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in PAIRS])
    return cls(
        policy(folder, tune), reward_funcs=rewards, args=args, train_dataset=prompts, eval_dataset=prompts,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip


def curve(trainer) -> torch.Tensor:
    """Loss and gradient norm of each step [steps, 2]."""
    trainer.train()
    return torch.tensor(
        [(r["loss"], r["grad_norm"]) for r in trainer.state.log_history if "grad_norm" in r],
        dtype=torch.float64,
    )


def difference(ours: torch.Tensor, theirs: torch.Tensor, size: float = 0.0) -> float:
    """Largest relative difference of losses and gradient norms; a loss below `size` counts as that."""
    assert ours.shape == theirs.shape
    assert ours.isfinite().all()
    return float(((ours - theirs).abs() / theirs.abs().maximum(torch.tensor([size, 1e-9]))).max())
