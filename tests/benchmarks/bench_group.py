"""A group update: one prompt with K completions, computed once or K times, and by TRL, step by step
in turn in one process.

    python tests/benchmarks/bench_group.py [--prompt 256] [--completion 64] [--completions 8]
    [--size 15M] [--steps 12]

Forward, backward and optimiser step of GRPO without a KL (one model). A stand-in gives TRL's
trainer the same completions in no time; it runs with gradient checkpointing on and off. The table
goes to stdout as Markdown.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from bench_dpo import RATE, callback_between_steps
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import SHAPES, dialogues, grpo_arguments, write_world

from alignkit.batches import Bundle
from alignkit.config.train import TrainConfig
from alignkit.objectives.online.grpo import GRPO
from alignkit.policies.module import PolicyModule
from alignkit.policies.pair import PolicyPair
from alignkit.training.optimizer import make_optimizer
from alignkit.training.reduction import Reducer


def group(prompt: torch.Tensor, completion: int, completions: int, vocab: int) -> Bundle:
    """Random completions with random advantages and no drift since sampling."""
    made = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, vocab, (completion,), generator=made) for _ in range(completions)]
    advantages = [torch.randn(1, generator=made).expand(completion) for _ in ids]
    tokens = {"behavior": [torch.full((completion,), -9.0) for _ in ids], "advantages": advantages}
    masks = [torch.ones(completion, dtype=torch.bool) for _ in ids]
    rows = {"score": torch.zeros(completions)}
    return Bundle(prompt, ids, masks, "group", rows, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--completion", type=int, default=64)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--size", default="15M", choices=SHAPES)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=12)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(write_world(Path(folder), asked.size, asked.vocab), asked)


def report(folder: Path, asked: argparse.Namespace) -> None:
    """Time both layouts and TRL in turn and print the table."""
    objective = GRPO(beta=0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    pair = PolicyPair(PolicyModule(AutoModelForCausalLM.from_pretrained(folder)), None, {})
    optimizer = pair.prepare(accelerator, partial(make_optimizer, TrainConfig(learning_rate=RATE)))
    reducer = Reducer(objective, pair, accelerator, 1 << 20, 1.0)
    prompt = text_of(folder, asked.prompt)
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(prompt)["input_ids"])
    bundle = group(ids, asked.completion, asked.completions, asked.vocab)
    seconds: dict[str, list[float]] = {}

    def ours(trl: str, theirs: float) -> None:
        for pair.layout in ("shared_prefix", "padded"):
            began = time.perf_counter()
            reducer.backward([bundle])
            optimizer.step()
            optimizer.zero_grad()
            seconds.setdefault(pair.layout, []).append(time.perf_counter() - began)
        seconds.setdefault(trl, []).append(theirs)

    for name, on in (("TRL, no checkpointing", False), ("TRL, checkpointing", True)):
        run_trl(
            folder,
            prompt,
            bundle.completions,
            asked.steps,
            on,
            callback_between_steps(partial(ours, name)),
        )
    shared = statistics.median(seconds["shared_prefix"][1:])
    print(
        f"\nGroup update, prompt of {len(ids)} tokens, {asked.completions} completions of {asked.completion}, {asked.size} "
        f"Llama, vocabulary {asked.vocab}, {torch.get_num_threads()} threads, medians of {asked.steps - 1} steps\n"
    )
    print("| update | s | of alignkit's |\n|---|---|---|")
    for name, times in seconds.items():
        median = statistics.median(times[1:])
        print(
            f"| {f'alignkit, {name}' if name in ('shared_prefix', 'padded') else name} | {median:.3f} | {median / shared:.2f} |"
        )


def text_of(folder: Path, tokens: int) -> str:
    """A text of about so many tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.decode(tokenizer(dialogues(1, 8)[0]["prompt"])["input_ids"][:tokens])


def run_trl(
    folder: Path,
    prompt: str,
    completions: list[torch.Tensor],
    steps: int,
    checkpointing: bool,
    callback,
) -> None:
    """TRL's trainer on the same group in every step."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOTrainer

    arguments = grpo_arguments(
        folder / "trl",
        per_device_train_batch_size=len(completions),
        num_generations=len(completions),
        max_completion_length=len(completions[0]),
        max_steps=steps,
        learning_rate=RATE,
        gradient_checkpointing=checkpointing,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt}] * 8),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    answers = torch.stack(completions)
    trainer.model.generate = lambda input_ids=None, **_: torch.cat(
        [input_ids, answers.to(input_ids.device)], 1
    )
    trainer.train()


if __name__ == "__main__":
    main()
