"""Sampling: alignkit's decode loop beside `generate` with its defaults, in turn, in one process.

    python tests/benchmarks/bench_rollouts.py [--prompts 16] [--completions 4] [--prompt 64] [--new
    128] [--size 15M] [--vllm .venv-vllm/bin/python]

Twice: no token ends a completion, so that both draw the same number; and one token in a hundred
does, as completions end at different times in practice. The table goes to stdout as Markdown.

With `--vllm`, the Python of an environment with vLLM (`make test-vllm` makes one with vLLM's build
for CPUs), alignkit is compared with vLLM instead: a process of its own that draws in turn with this
one, in float32, with as many threads, the same prompts, and no token that ends a completion.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from world import SHAPES, write_world

from alignkit.batches import Draw
from alignkit.rollout.generate import OneModel
from alignkit.rollout.hf import HFSampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--completions", type=int, default=4)
    parser.add_argument(
        "--prompt",
        type=int,
        default=64,
        help="tokens of the longest prompt; the shortest has half of them",
    )
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--size", default="15M", choices=SHAPES)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--vllm", type=Path, help="Python of an environment with vLLM")
    asked = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        report(write_world(Path(folder), asked.size, asked.vocab), asked)


def report(folder: Path, asked: argparse.Namespace) -> None:
    """Time both in turn and print the table."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    tokenizer.eos_token = None
    made = torch.Generator().manual_seed(0)
    lengths = torch.linspace(asked.prompt // 2, asked.prompt, asked.prompts).int().tolist()
    prompts = [torch.randint(3, asked.vocab, (n,), generator=made) for n in lengths]
    rows = asked.prompts * asked.completions
    print(
        f"\nRollouts, {rows} sequences of up to {asked.new} new tokens after {asked.prompts} prompts of {lengths[0]} to "
        f"{lengths[-1]}, {asked.size} Llama, vocabulary {asked.vocab}, {torch.get_num_threads()} threads, medians of "
        f"{asked.repeats}\n"
    )
    other_name = "vLLM" if asked.vllm else "generate"
    print(
        f"| completions end | alignkit sequences/s | {other_name} sequences/s | ratio |\n|---|---|---|---|"
    )
    if asked.vllm:
        model.generation_config.eos_token_id = None
        show("at the cap", rows, beside_vllm(folder, model, tokenizer, prompts, asked))
        return
    ends = torch.randperm(asked.vocab, generator=made)[: asked.vocab // 100].tolist()
    for name, stop in (("at the cap", None), ("at 1 % of the tokens", ends)):
        model.generation_config.eos_token_id = stop
        show(name, rows, beside_generate(model, tokenizer, prompts, asked))


def show(name: str, rows: int, seconds: tuple[list[float], list[float]]) -> None:
    """Print a row of the table."""
    mine, other = (rows / statistics.median(times) for times in seconds)
    print(f"| {name} | {mine:.1f} | {other:.1f} | {mine / other:.2f} |", flush=True)


def in_turn(
    ours: Callable[[int], object], theirs: Callable[[int], object], repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of each repeat of both, after one that warms up."""
    seconds: tuple[list[float], list[float]] = [], []
    for step in range(repeats + 1):
        for times, act in zip(seconds, (ours, theirs)):
            began = time.perf_counter()
            act(step)
            times.append(time.perf_counter() - began)
    return seconds[0][1:], seconds[1][1:]


def sampling(
    model, tokenizer, prompts: list[torch.Tensor], asked: argparse.Namespace
) -> Callable[[int], object]:
    """What draws all completions with alignkit."""
    sampler = HFSampler(OneModel(model, tokenizer), max_new_tokens=asked.new)
    draw = Draw(asked.completions)
    return lambda step: sampler.sample(prompts, draw, step=step, prompt_ids=range(asked.prompts))


def beside_vllm(
    folder: Path, model, tokenizer, prompts: list[torch.Tensor], asked: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Seconds of each repeat of alignkit and of vLLM, in turn."""
    side = Path(__file__).with_name("vllm_side.py")
    request = {
        "prompts": [prompt.tolist() for prompt in prompts],
        "completions": asked.completions,
        "new": asked.new,
    }
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [asked.vllm, side, folder], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    ) as engine:
        assert engine.stdin is not None
        assert engine.stdout is not None

        def theirs(_: int) -> None:
            print("draw", file=engine.stdin, flush=True)
            drawn = engine.stdout.readline().strip()
            wanted = asked.prompts * asked.completions * asked.new
            if drawn != str(wanted):
                raise SystemExit(f"{asked.vllm} {side} drew {drawn or 'no'} tokens, not {wanted}")

        print(json.dumps(request), file=engine.stdin, flush=True)
        seconds = in_turn(sampling(model, tokenizer, prompts, asked), theirs, asked.repeats)
        engine.stdin.close()
    return seconds


def beside_generate(
    model, tokenizer, prompts: list[torch.Tensor], asked: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Seconds of each repeat of alignkit and of `generate`, in turn."""
    rows = torch.stack(
        [torch.nn.functional.pad(prompt, (asked.prompt - len(prompt), 0)) for prompt in prompts]
    )
    rows = rows.repeat_interleave(asked.completions, 0)

    def theirs(step: int) -> None:
        torch.manual_seed(step)
        model.generate(
            rows,
            attention_mask=(rows > 0).long(),
            do_sample=True,
            top_k=0,
            max_new_tokens=asked.new,
            pad_token_id=0,
        )

    return in_turn(sampling(model, tokenizer, prompts, asked), theirs, asked.repeats)


if __name__ == "__main__":
    main()
