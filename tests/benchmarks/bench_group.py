"""A group update in both layouts: one prompt with K completions, the prompt computed once or K times.

    python tests/benchmarks/bench_group.py [--prompt 256] [--completion 64] [--completions 8] [--size 15M] [--steps 12]

Forward and backward of GRPO without a KL (one model) on random tokens, step by step in turn in one process. The table goes
to stdout as Markdown.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM
from world import SHAPES, write_model

from alignkit.batches import Bundle
from alignkit.objectives.grpo import GRPO
from alignkit.policies.module import PolicyModule
from alignkit.policies.pair import PolicyPair
from alignkit.reduction import Reducer


def group(prompt: int, completion: int, completions: int, vocab: int) -> Bundle:
    """Random tokens with random advantages and no drift since sampling."""
    made = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, vocab, (completion,), generator=made) for _ in range(completions)]
    advantages = [torch.randn(1, generator=made).expand(completion) for _ in ids]
    tokens = {"behavior": [torch.full((completion,), -9.0) for _ in ids], "advantages": advantages}
    masks = [torch.ones(completion, dtype=torch.bool) for _ in ids]
    rows = {"score": torch.zeros(completions)}
    return Bundle(torch.randint(3, vocab, (prompt,), generator=made), ids, masks, "group", rows, tokens)


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
        report(write_model(Path(folder), asked.size, asked.vocab), asked)


def report(folder: Path, asked: argparse.Namespace) -> None:
    """Time both layouts in turn and print the table."""
    objective = GRPO(beta=0)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    pair = PolicyPair(PolicyModule(AutoModelForCausalLM.from_pretrained(folder)), None, {})
    pair.prepare(accelerator)
    reducer = Reducer(objective, pair, accelerator, 1 << 20)
    bundle = group(asked.prompt, asked.completion, asked.completions, asked.vocab)
    layouts = ("shared_prefix", "padded")
    seconds: dict[str, list[float]] = {layout: [] for layout in layouts}
    for _ in range(asked.steps):
        for pair.layout in layouts:
            began = time.perf_counter()
            reducer.backward([bundle])  # ends with a figure read from the device: nothing is pending
            seconds[pair.layout].append(time.perf_counter() - began)
            for parameter in pair.parameters():
                parameter.grad = None
    logps = []
    for pair.layout in layouts:
        with torch.no_grad():
            logps.append(pair.logps([bundle], objective.plan).policy)
    shared, padded = (statistics.median(seconds[layout][1:]) for layout in layouts)
    difference = float((logps[0] - logps[1]).abs().max())
    print(
        f"\nGroup update, prompt of {asked.prompt} tokens, {asked.completions} completions of {asked.completion}, {asked.size} "
        f"Llama, vocabulary {asked.vocab}, {torch.get_num_threads()} threads, medians of {asked.steps - 1} steps\n"
    )
    print("| shared prefix, s | padded, s | ratio | largest difference of a log-prob |")
    print("|---|---|---|---|")
    print(f"| {shared:.3f} | {padded:.3f} | {shared / padded:.2f} | {difference:.1e} |")


if __name__ == "__main__":
    main()
