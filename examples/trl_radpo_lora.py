"""Ra-DPO with a LoRA adapter inside TRL: the risk is computed over the whole vocabulary, the
reference is the base model.

    python examples/trl_radpo_lora.py MODEL PREFERENCES.jsonl OUT

The rows of the file have the columns prompt, chosen and rejected.
"""

import sys

from datasets import load_dataset
from peft import LoraConfig
from trl import DPOConfig

from alignkit import RaDPO
from alignkit.integrations.trl import as_trl_trainer

model, data, out = sys.argv[1:4]
Trainer = as_trl_trainer(RaDPO(beta=0.1, risk="cvar", level=0.95))

trainer = Trainer(
    model=model,
    args=DPOConfig(
        output_dir=out,
        max_steps=4,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        bf16=False,
    ),
    train_dataset=load_dataset("json", data_files=data, split="train"),
    peft_config=LoraConfig(r=8, target_modules="all-linear"),
)
trainer.train()
trainer.save_model(out)
