"""The time of TRL's step on the model and rows of `gpu_world`, where TRL and datasets are installed."""

import statistics
import tempfile
import time

from gpu_world import GPU, model_of, pairs_of, tokenizer_of
from transformers import TrainerCallback


class StepTimes(TrainerCallback):
    """Seconds of each optimiser step."""

    def __init__(self):
        self.seconds = []
        self.began = 0.0

    def on_step_begin(self, *arguments, **fields):
        self.began = time.perf_counter()

    def on_step_end(self, *arguments, **fields):
        self.seconds.append(time.perf_counter() - self.began)


def trl_seconds(size, name, count, length, repeats, liger):
    """Seconds of a step of TRL's DPO or GRPO (sampling included), the median of `repeats`."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

    tokenizer = tokenizer_of(size)
    texts = [
        {
            "prompt": tokenizer.decode(bundle.prompt),
            "chosen": tokenizer.decode(bundle.completions[0]),
            "rejected": tokenizer.decode(bundle.completions[1]),
        }
        for bundle in pairs_of(size, count, length)
    ]
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            "output_dir": folder,
            "per_device_train_batch_size": count,
            "max_steps": repeats + 1,
            "learning_rate": 1e-6,
            "bf16": GPU,
            "use_cpu": not GPU,
            "report_to": [],
            "save_strategy": "no",
            "logging_steps": 1000,
            "use_liger_kernel": liger,
            "gradient_checkpointing": False,
        }
        given = {"processing_class": tokenizer, "callbacks": [times]}
        # TRL loads its reference by the model's name.
        model = f"{folder}/model"
        model_of(size, "cuda" if GPU else "cpu").save_pretrained(model)
        tokenizer.save_pretrained(model)
        if name == "dpo":
            rows = Dataset.from_list(texts)
            DPOTrainer(
                model, args=DPOConfig(max_length=None, **shared), train_dataset=rows, **given
            ).train()
        else:
            rows = Dataset.from_list([{"prompt": row["prompt"]} for row in texts])
            config = GRPOConfig(
                num_generations=4, max_completion_length=length, beta=0.01, **shared
            )

            def reward(prompts, completions, **columns):
                return [sum(ids) % 7 / 7 for ids in columns["completion_ids"]]

            GRPOTrainer(model, reward, args=config, train_dataset=rows, **given).train()
    return statistics.median(times.seconds[1:])
