"""An objective of your own, in a few lines, on TRL's DPOTrainer (and the same class in `alignkit
train`).

    python examples/trl_custom_objective.py MODEL PREFERENCES.jsonl OUT

The rows of the file have the columns prompt, chosen and rejected.
"""

import sys

from datasets import load_dataset
from pydantic import PositiveFloat
from torch.nn.functional import softplus
from trl import DPOConfig

from alignkit.batches import LossTerms, PairBatch
from alignkit.integrations.trl import as_trl_trainer
from alignkit.objectives.base import PairObjective
from alignkit.tensors import pair_log_ratios
from alignkit.testing import check_objective


class TemperedDPO(PairObjective):
    """DPO whose pairs stop pulling once their margin is `target`."""

    beta: PositiveFloat = 0.1
    target: PositiveFloat = 2.0

    def loss(self, batch: PairBatch) -> LossTerms:
        chosen, rejected = pair_log_ratios(*batch.sequence_logps())  # [B] each
        margins = self.beta * (chosen - rejected)
        return batch.rows("tempered", softplus(self.target - margins), scale=self.beta)


# Gradients, padding, micro-batches and extreme values are checked before a GPU hour is spent.
objective = TemperedDPO(beta=0.1)
check_objective(objective)

model, data, out = sys.argv[1:4]
trainer = as_trl_trainer(objective)(
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
