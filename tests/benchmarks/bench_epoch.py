"""A whole DPO epoch with evaluation and saving: alignkit's run beside TRL's trainer.

    python tests/benchmarks/bench_epoch.py [--rows 128] [--held-out 32] [--size 15M] [--vocab 8192]
    [--sides alignkit ...]

Each side is a process of its own, one after the other, from the interpreter's start to its end:
imports, loading, tokenising, one epoch in batches of 8, an evaluation on held-out rows in the middle
and at the end, checkpoints, and the finished model. A checkpoint is asked for in the middle and at
the end; alignkit leaves out the last one unless its evaluation is the best.

All sides see the same rows in the same order, with the same learning rate and beta, so that their
last evaluation must agree; where it does not, the command fails. The table goes to stdout as
Markdown.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

BATCH, BETA, RATE, LONGEST = 8, 0.1, 1e-5, 1024
AGREEMENT = 1e-4  # largest difference of the last evaluation's loss

# name -> overrides of the recipe
OURS: dict[str, list[str]] = {
    "alignkit": [],
    "alignkit, live reference": ["reference.kind=frozen"],
}
# name -> fields of TRL's DPOConfig
THEIRS: dict[str, dict[str, Any]] = {
    "TRL, no checkpointing, 2 x 4": {},
    "TRL, no checkpointing, 2 x 4, precomputed reference": {"precompute_ref_log_probs": True},
    "TRL, no checkpointing, 8 x 1": {
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
    },
}


class Watch:
    """Seconds that watched methods take, by the name of what they do."""

    def __init__(self) -> None:
        self.first_step = 0.0  # time.time() of its beginning
        self.seconds = {"evaluation": 0.0, "saving": 0.0}
        self._busy = False

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Add what `owner.method` takes to `name`; what a watched method calls counts once."""
        original = getattr(owner, method)

        @wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._busy:
                return original(*args, **kwargs)

            self._busy, began = True, time.time()
            try:
                return original(*args, **kwargs)
            finally:
                self._busy = False
                self.seconds[name] += time.time() - began

        setattr(owner, method, watched)

    def watch_steps(self, owner: Any, method: str) -> None:
        """Note when `owner.method`, which begins a step, is called for the first time."""
        original = getattr(owner, method)

        @wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.first_step = self.first_step or time.time()
            return original(*args, **kwargs)

        setattr(owner, method, watched)

    def times(self) -> dict[str, float]:
        """When the first step began, and the seconds from there to now by what was done."""
        rest = time.time() - self.first_step - sum(self.seconds.values())
        return {"first_step": self.first_step, "training": rest, **self.seconds}


def run_alignkit(folder: Path, rows: int, overrides: list[str]) -> dict[str, float]:
    """An epoch by `run_recipe`: its times and the loss of its last evaluation."""
    from alignkit.config.recipe import load_recipe
    from alignkit.runs.launch import run_recipe
    from alignkit.training import loop

    watch = Watch()
    watch.watch_steps(loop._Loop, "_step")
    watch.watch(loop._Loop, "_evaluate", "evaluation")
    for method in ("_save", "_finish"):
        watch.watch(loop._Loop, method, "saving")
    half = rows // BATCH // 2
    settings = [
        f"model.name_or_path={folder / 'model'}", f"data.train={folder / 'train.jsonl'}",
        f"data.eval={folder / 'held_out.jsonl'}", f"data.max_length={LONGEST}",
        f"output_dir={folder / 'alignkit'}", f"objective.beta={BETA}", "train.epochs=1",
        f"train.batch_size={BATCH}", f"train.learning_rate={RATE}", "train.schedule=constant",
        "train.warmup_steps=0", "train.dtype=float32", f"train.eval_every={half}",
        f"train.save_every={half}", "train.log_samples_every=0",
    ]  # fmt: skip
    result = run_recipe(load_recipe("dpo", [*settings, *overrides]))
    saved = len(list((folder / "alignkit").rglob("step-*")))
    return {**watch.times(), "loss": result.metrics["eval_loss"], "checkpoints": saved}


def run_trl(folder: Path, rows: int, fields: dict[str, Any]) -> dict[str, float]:
    """The same by TRL's DPOTrainer."""
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    half = rows // BATCH // 2
    common = {
        "per_device_train_batch_size": BATCH // 4,
        "per_device_eval_batch_size": BATCH // 4,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "beta": BETA,
        "max_length": LONGEST,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "eval_strategy": "steps",
        "eval_steps": half,
        "save_steps": half,
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = DPOTrainer(
        str(folder / "model"),
        args=DPOConfig(output_dir=str(folder / "trl"), **{**common, **fields}),
        train_dataset=Dataset.from_list(read(folder / "in_order.jsonl")),
        eval_dataset=Dataset.from_list(read(folder / "held_out.jsonl")),
    )
    watch = Watch()
    watch.watch_steps(trainer, "training_step")
    watch.watch(trainer, "evaluate", "evaluation")
    for method in ("_save_checkpoint", "save_model"):
        watch.watch(trainer, method, "saving")
    trainer.train()
    trainer.save_model()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    saved = len(list((folder / "trl").glob("checkpoint-*")))
    return {**watch.times(), "loss": losses[-1], "checkpoints": saved}


def read(file: Path) -> list[dict[str, str]]:
    """The rows of a JSON Lines file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file: Path, rows: list[dict[str, str]]) -> None:
    """Write a JSON Lines file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_rows(folder: Path, given: argparse.Namespace) -> None:
    """The training rows, the same in the order in which alignkit visits them, and held-out ones."""
    from world import pairs

    from alignkit.sources.dataset import Order

    rows = pairs(given.rows + given.held_out)
    train = rows[: given.rows]
    write(folder / "train.jsonl", train)
    write(folder / "in_order.jsonl", [train[i] for i in Order(given.rows, seed=0)[: given.rows]])
    write(folder / "held_out.jsonl", rows[given.rows :])


def measured(side: str, folder: Path, rows: int) -> dict[str, float]:
    """What a process of `side` printed, with its seconds from start to end."""
    from world import measured_alone

    with tempfile.TemporaryDirectory(dir=folder) as name:
        own = Path(name)
        for part in folder.iterdir():
            if part != own:
                (own / part.name).symlink_to(part)
        began = time.time()
        arguments = ("--alone", side, "--folder", name, "--rows", str(rows))
        found = measured_alone(__file__, *arguments, frees_at_once=False)
        whole = time.time() - began
    return {**found, "whole": whole, "before": found["first_step"] - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=128, help="a multiple of 16")
    parser.add_argument("--held-out", type=int, default=32, help="a multiple of 8")
    parser.add_argument("--size", default="15M")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--sides", nargs="+", default=[*OURS, *THEIRS], choices=[*OURS, *THEIRS])
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rows < 2 * BATCH or given.rows % (2 * BATCH) or given.held_out % BATCH:
        parser.error("--rows must be a multiple of 16 and --held-out one of 8")

    if given.alone:
        act: Callable[..., dict[str, float]] = run_alignkit if given.alone in OURS else run_trl
        setting = {**OURS, **THEIRS}[given.alone]
        print(json.dumps(act(Path(given.folder), given.rows, setting)))
        return

    with tempfile.TemporaryDirectory() as name:
        report(Path(name), given)


def report(folder: Path, given: argparse.Namespace) -> None:
    """Run every side and print the table. SystemExit where the sides did not train the same."""
    import torch
    from world import GPU, write_world

    write_world(folder / "model", given.size, given.vocab)
    write_rows(folder, given)
    runs = {side: measured(side, folder, given.rows) for side in given.sides}
    ours = [side for side in runs if side in OURS]
    base = next(iter(runs.values()))["loss"]

    machine = torch.cuda.get_device_name() if GPU else f"{torch.get_num_threads()} threads"
    print(
        f"\nA DPO epoch of {given.rows} GSM8K pairs, batch {BATCH}, two evaluations on {given.held_out} "
        f"held-out pairs, {given.size}, vocabulary {given.vocab}, float32, {machine}; seconds\n"
    )
    ratios = "".join(f" time / {side} |" for side in ours)
    print(
        "| side | whole process | before the first step | training | evaluation | saving "
        f"| checkpoints | last held-out loss | difference |{ratios}\n"
        + "|---" * (9 + len(ours))
        + "|"
    )
    for side, run in runs.items():
        parts = ("whole", "before", "training", "evaluation", "saving")
        shares = "".join(f" {run['whole'] / runs[other]['whole']:.2f} |" for other in ours)
        print(
            f"| {side} | {' | '.join(f'{run[part]:.1f}' for part in parts)} "
            f"| {run['checkpoints']:.0f} | {run['loss']:.5f} | {abs(run['loss'] - base):.1e} |{shares}"
        )
    if abs(base - math.log(2)) <= 10 * AGREEMENT:
        raise SystemExit(
            f"the loss is still {base:.5f}, that of no training at all; give more rows"
        )
    apart = [side for side, run in runs.items() if not abs(run["loss"] - base) <= AGREEMENT]
    if apart:
        raise SystemExit(
            f"not the same training: the last held-out loss of {', '.join(apart)} is more than "
            f"{AGREEMENT:g} away from that of {next(iter(runs))}"
        )


if __name__ == "__main__":
    main()
