"""H-DPO inside an existing TRL script: one line changes, the trainer class.

    python examples/trl_hdpo.py MODEL PREFERENCES.jsonl OUT

The rows of the file have the columns prompt, chosen and rejected.
"""

import sys

from datasets import load_dataset
from trl import DPOConfig

from alignkit import HDPO
from alignkit.integrations.trl import as_trl_trainer

model, data, out = sys.argv[1:4]
Trainer = as_trl_trainer(HDPO(beta=0.1, alpha=0.9))  # was: from trl import DPOTrainer as Trainer

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
)
trainer.train()
trainer.save_model(out)
