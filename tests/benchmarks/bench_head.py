"""Memory of the chunked head at a large vocabulary, above weights and gradients; each size in a
process of its own.

python tests/benchmarks/bench_head.py [--vocab 131072] [--width 512]
"""

import argparse
import json
import time

import torch
from torch import nn
from world import measured_alone, peak_memory, present_memory

from alignkit.policies.head import Head, head_figures


def alone(vocab: int, width: int, tokens: int) -> None:
    """One forward and backward of the head; MiB above what was held before, the weight's gradient
    not counted.
    """
    torch.manual_seed(0)
    module = nn.Linear(width, vocab, bias=False)
    module.weight.grad = torch.ones_like(module.weight)
    warm = torch.randn(2, width, requires_grad=True)
    head_figures(Head(module), warm, torch.zeros(2, dtype=torch.int64), {})["policy"].sum()
    hidden, labels = torch.randn(tokens, width, requires_grad=True), torch.randint(vocab, (tokens,))
    before, began = present_memory(), time.perf_counter()
    head_figures(Head(module), hidden, labels, {})["policy"].sum().backward()
    print(json.dumps({"memory": peak_memory() - before, "seconds": time.perf_counter() - began}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.tokens:
        alone(given.vocab, given.width, given.tokens)
        return
    print(f"\nThe head, vocabulary {given.vocab}, width {given.width}, float32\n")
    print(
        "| completion tokens | MiB above weights and gradients | all logits would take, MiB | s |"
    )
    print("|---|---|---|---|")
    for tokens in (1024, 2048, 4096, 8192):
        arguments = (
            "--vocab",
            str(given.vocab),
            "--width",
            str(given.width),
            "--tokens",
            str(tokens),
        )
        found = measured_alone(__file__, *arguments)
        print(
            f"| {tokens} | {found['memory']:.0f} | {tokens * given.vocab / 2**18:.0f} | {found['seconds']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
