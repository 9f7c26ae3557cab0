"""A whole GRPO step, sampling included: alignkit's run and TRL's trainer, in turn, in one process.

    python tests/benchmarks/bench_grpo.py [--prompts 16] [--completions 8] [--new 128] [--steps 4]
    [--size 15M] [--dtype float32] [--settings 2x4 ...]

GSM8K questions, no KL, one update per rollout, sampling by transformers on both sides. TRL samples
a step's completions in one batch and updates on them whole or in quarters, with gradient
checkpointing off and on. Before each setting of TRL, alignkit runs as many steps. The table goes to
stdout as Markdown. What both sides learn from is compared at the first step, where their weights
are the same: the mean reward of their samples and the norm of the gradient. "Floor": the matrix
products that nobody can leave out, one forward of every token while sampling and a forward and a
backward of it in the update, each shape timed on the machine before the sides run. In bfloat16 both sides
compute by autocast over float32 weights.
"""

import argparse
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from world import GPU, SHAPES, clock, grpo_arguments, pairs, write_world

import alignkit
from alignkit import GRPO

RATE = 1e-5
LONGEST = 1024  # tokens of a product whose time is taken, of which a step has many
# name -> (completions of one forward as a share of the step's, gradient checkpointing)
SETTINGS = {
    "no checkpointing, whole": (1, False),
    "no checkpointing, quarters": (4, False),
    "checkpointing, whole": (1, True),
    "checkpointing, quarters": (4, True),
}


def share_of_letters(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward that every sample of a random model has another value of."""
    return [sum(c.isalpha() for c in text) / max(len(text), 1) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="the first one is warm-up")
    parser.add_argument("--size", default="15M", choices=SHAPES)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    asked = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = write_world(Path(name) / "model", asked.size, asked.vocab)
        report(folder, asked)


def report(folder: Path, asked: argparse.Namespace) -> None:
    """Run everything and print the table."""
    prompts = [{"prompt": row["prompt"]} for row in pairs(asked.prompts * asked.steps)]
    machine = torch.cuda.get_device_name() if GPU else f"{torch.get_num_threads()} threads"
    lines = []
    least = floor(folder, prompts[: asked.prompts], asked)
    for number, setting in enumerate(asked.settings):
        ours = run_alignkit(folder, prompts, asked, folder.parent / f"run-{number}")
        theirs = run_trl(folder, prompts, asked, setting)
        mine, other = (statistics.median(side["seconds"][1:]) for side in (ours, theirs))
        lines.append(
            f"| {setting} | {mine:.2f} | {other:.2f} | {other / mine:.2f} "
            f"| {least / mine:.2f} | {other / least:.2f} "
            f"| {ours['reward']:.4f} / {theirs['reward']:.4f} "
            f"| {ours['norm']:.3f} / {theirs['norm']:.3f} |"
        )
    print(
        f"\nA GRPO step, {asked.prompts} prompts x {asked.completions} completions of at most "
        f"{asked.new} tokens, {asked.size}, vocabulary {asked.vocab}, {asked.dtype}, {machine}, "
        f"medians of {asked.steps - 1} steps\n"
    )
    print(
        "| TRL with | alignkit s | TRL s | ratio | floor / alignkit | TRL / floor "
        "| mean reward, alignkit / TRL | gradient norm |\n|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(lines))


@torch.no_grad()
def floor(folder: Path, prompts: list[dict], asked: argparse.Namespace) -> float:
    """Seconds of the matrix products of a step in which every completion has all of its tokens."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = asked.prompts * asked.completions
    new = rows * asked.new
    read = sum(len(tokenizer(row["prompt"])["input_ids"]) for row in prompts)

    seconds = 0.0
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        tokens = new if module is model.get_output_embeddings() else read + new
        weight = module.weight.detach().to(getattr(torch, asked.dtype))
        parts = tokens // LONGEST
        seconds += asked.new * _seconds(weight, rows, forward_only=True)
        seconds += parts * _seconds(weight, LONGEST, forward_only=False)
    return seconds


def _seconds(weight: torch.Tensor, rows: int, *, forward_only: bool) -> float:
    """Of the products of one linear layer with so many rows, the shortest of three times."""
    x, g = (torch.ones(rows, size, dtype=weight.dtype) for size in reversed(weight.shape))
    acts = [lambda: x @ weight.T]
    if not forward_only:
        acts += [lambda: g @ weight, lambda: g.T @ x]

    times = []
    for _ in range(3):
        began = clock()
        for act in acts:
            act()
        times.append(clock() - began)
    return min(times)


def run_alignkit(
    folder: Path, prompts: list[dict], asked: argparse.Namespace, output: Path
) -> dict[str, Any]:
    """Seconds of each step, and the first step's mean reward and gradient norm."""
    run = alignkit.train(
        GRPO(beta=0.0),
        model=str(folder),
        data=prompts,
        rewards=share_of_letters,
        output_dir=output,
        steps=asked.steps,
        batch_size=asked.prompts,
        learning_rate=RATE,
        schedule="constant",
        completions=asked.completions,
        max_new_tokens=asked.new,
        train={"dtype": asked.dtype},
    )
    frame = run.metrics
    seconds = [after - before for before, after in pairwise([0.0, *frame["time"]])]
    return {
        "seconds": seconds,
        "reward": frame["reward"].iloc[0],
        "norm": frame["grad_norm"].iloc[0],
    }


def run_trl(
    folder: Path, prompts: list[dict], asked: argparse.Namespace, setting: str
) -> dict[str, Any]:
    """The same for TRL's trainer."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOTrainer

    parts, checkpointing = SETTINGS[setting]
    rows = asked.prompts * asked.completions
    arguments = grpo_arguments(
        folder.parent / "trl",
        per_device_train_batch_size=rows // parts,
        gradient_accumulation_steps=parts,
        num_generations=asked.completions,
        max_completion_length=asked.new,
        max_steps=asked.steps,
        learning_rate=RATE,
        gradient_checkpointing=checkpointing,
        bf16=asked.dtype == "bfloat16",
        logging_steps=1,
    )
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(clock())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(clock())

    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=share_of_letters,
        args=arguments,
        train_dataset=Dataset.from_list(prompts),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Clock()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    first = next(row for row in trainer.state.log_history if "reward" in row)
    return {
        "seconds": [after - before for before, after in pairwise(ends)],
        "reward": first["reward"],
        "norm": first["grad_norm"],
    }


if __name__ == "__main__":
    main()
