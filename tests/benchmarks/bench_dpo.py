"""DPO on GSM8K pairs: alignkit beside TRL, step by step in turn, in one process; peak memory in a process of each.

    python tests/benchmarks/bench_dpo.py [--steps 12] [--size 15M] [--vocab 8192] [--dtype float32]

Both sides train the same weights on the same batches with a live reference. TRL takes the better of gradient
checkpointing on and off. The table goes to stdout as Markdown.
"""

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from world import measured_alone, pairs, peak_memory, write_world

BETA, RATE = 0.1, 1e-5


class Ours:
    """alignkit's step: the loop's own reducer, optimiser and update."""

    def __init__(self, folder: Path, rows: list[dict], batch: int, dtype: str):
        from alignkit.data import load_bundles
        from alignkit.data.config import DataConfig
        from alignkit.loop import make_optimizer
        from alignkit.objectives.dpo import DPO
        from alignkit.policies.config import ModelConfig, ReferenceConfig
        from alignkit.policies.load import load_pair
        from alignkit.reduction import Reducer
        from alignkit.train_config import TrainConfig

        objective = DPO(beta=BETA)
        accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if dtype == "bfloat16" else "no")
        model = ModelConfig(name_or_path=str(folder))
        self.pair = load_pair(
            model, ReferenceConfig(kind="frozen"), None, objective.plan, device=accelerator.device, fixed_data=True
        )
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        bundles, _ = load_bundles(DataConfig(train=str(file)), "pair", self.pair.tokenizer)
        self.batches = [bundles[i : i + batch] for i in range(0, len(bundles), batch)]
        config = TrainConfig(learning_rate=RATE)
        self.optimizer = self.pair.prepare(accelerator, partial(make_optimizer, config))
        self.reducer = Reducer(objective, self.pair, accelerator, 4096, 1.0)

    def step(self, index: int) -> float:
        metrics = self.reducer.backward(self.batches[index])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics["loss"]


def trl_trainer(folder: Path, rows: list[dict], batch: int, dtype: str, checkpointing: bool, steps: int, callback):
    """TRL's trainer on the same weights and batches."""
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from transformers.utils.logging import disable_progress_bar
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    disable_progress_bar()
    arguments = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        beta=BETA,
        max_length=1024,
        gradient_checkpointing=checkpointing,
        train_sampling_strategy="sequential",
        bf16=dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    model, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = Dataset.from_list(rows)
    trainer = DPOTrainer(model, reference, arguments, train_dataset=data, processing_class=tokenizer, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)  # the table alone goes to stdout
    return trainer


def callback_between_steps(act):
    """A trainer callback that calls `act(seconds of the step just done, its loss)`; the act's own time is not TRL's."""
    from transformers import TrainerCallback

    class Between(TrainerCallback):
        began = 0.0

        def on_train_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            act(time.perf_counter() - self.began)
            self.began = time.perf_counter()

    return Between()


def alternate(
    folder: Path, rows: list[dict], steps: int, dtype: str, checkpointing: bool
) -> tuple[list[float], list[float], float]:
    """Seconds of each step of alignkit and of TRL, in turn, and the largest difference of their losses."""
    ours, theirs, losses = [], [], []
    side = Ours(folder, rows, 8, dtype)

    def act(seconds: float) -> None:
        theirs.append(seconds)
        began = time.perf_counter()
        losses.append(side.step(len(ours)))
        ours.append(time.perf_counter() - began)

    trainer = trl_trainer(folder, rows, 8, dtype, checkpointing, steps, callback_between_steps(act))
    trainer.train()
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return ours[1:], theirs[1:], max(abs(a - b) for a, b in zip(losses, logged))


def alone(who: str, folder: Path, steps: int, dtype: str) -> None:
    """Peak memory of one side, printed as JSON."""
    rows = pairs(8 * steps)
    if who == "alignkit":
        side = Ours(folder, rows, 8, dtype)
        for i in range(steps):
            side.step(i)
    else:
        trl_trainer(folder, rows, 8, dtype, who == "trl-checkpointing", steps, callback_between_steps(lambda _: None)).train()
    print(json.dumps({"memory": peak_memory()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--size", default="15M")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        alone(given.alone, Path(given.folder), given.steps, given.dtype)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = write_world(Path(name), given.size, given.vocab)
        report(folder, given)


def report(folder: Path, given) -> None:
    """Run everything and print the table."""
    settings = {"trl": False, "trl-checkpointing": True}
    found = {who: alternate(folder, pairs(8 * given.steps), given.steps, given.dtype, on) for who, on in settings.items()}
    common = ("--folder", str(folder), "--steps", str(min(given.steps, 4)), "--dtype", given.dtype)
    memory = {who: measured_alone(__file__, "--alone", who, *common)["memory"] for who in ("alignkit", *settings)}
    print(
        f"\nDPO, GSM8K pairs, batch 8, {given.size} Llama, vocabulary {given.vocab}, {given.dtype}, live reference, "
        f"{torch.get_num_threads()} threads, medians of {given.steps - 1} steps\n"
    )
    print("| against | alignkit pairs/s | TRL pairs/s | ratio | alignkit MiB | TRL MiB | ratio | loss difference |")
    print("|---|---|---|---|---|---|---|---|")
    for who, (ours, theirs, difference) in found.items():
        mine, other = 8 / statistics.median(ours), 8 / statistics.median(theirs)
        print(
            f"| {who} | {mine:.2f} | {other:.2f} | {mine / other:.2f} | {memory['alignkit']:.0f} | {memory[who]:.0f} | "
            f"{memory['alignkit'] / memory[who]:.2f} | {difference:.1e} |"
        )


if __name__ == "__main__":
    main()
