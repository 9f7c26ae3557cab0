"""Regularised policy gradient on TRL's GRPOTrainer: TRL samples, rewards and batches; the loss is
alignkit's.

    python examples/trl_rpg.py MODEL PROMPTS.jsonl OUT

The rows of the file have the column prompt.
"""

import sys

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from alignkit import RPG
from alignkit.integrations.trl import as_trl_trainer

model, data, out = sys.argv[1:4]


def happy(completions, **columns):
    """A reward in TRL's signature: how many words of joy."""
    words = ("happy", "smile", "love", "fun")
    return [float(sum(text.count(word) for word in words)) for text in completions]


# With anchor="behavior" the KL is to the sampler (the paper's iterative reference), so no second
# model is loaded.
Trainer = as_trl_trainer(RPG(anchor="behavior", beta=1e-4), base=GRPOTrainer)

trainer = Trainer(
    model=model,
    reward_funcs=happy,
    args=GRPOConfig(
        output_dir=out,
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=16,
        logging_steps=1,
        report_to=[],
        bf16=False,
    ),
    train_dataset=load_dataset("json", data_files=data, split="train").select_columns("prompt"),
)
trainer.train()
trainer.save_model(out)
