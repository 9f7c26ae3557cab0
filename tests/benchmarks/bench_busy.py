"""A training step beside a neighbour: what the waiting threads of OpenMP cost, quiet and busy.

    python tests/benchmarks/bench_busy.py [--steps 10] [--repeats 5] [--spins 0 1000 10000]

Each way of waiting is a process of its own, since OpenMP reads its settings when torch is loaded;
their steps are measured in turn. The neighbour is one process that multiplies matrices on all
cores. The table goes to stdout as Markdown; the second figure of a cell is CPU time.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager

SHAPES = {
    "0.3 M": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3},
    "15 M": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 7},
}
ROWS, TOKENS = 64, 24
NEIGHBOUR = "import torch\na = torch.randn(1024, 1024)\nwhile True: a @ a"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="steps in one measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--spins", nargs="+", default=["0", "1000", "10000"])
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--worker", choices=SHAPES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work(asked.worker)
        return

    ways = {"OpenMP's default": {}}
    ways |= {f"GOMP_SPINCOUNT={spins}": {"GOMP_SPINCOUNT": spins} for spins in asked.spins}
    ways["one thread"] = {"OMP_NUM_THREADS": "1"}
    print(
        f"\nA step of forward, backward and AdamW on {ROWS} rows of {TOKENS} tokens, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start, medians of "
        f"{asked.repeats} measurements in turn\n"
    )
    print("| model | waiting | quiet, ms (CPU) | busy, ms (CPU) | busy / quiet |")
    print("|---|---|---|---|---|")
    for size in asked.sizes:
        with workers(size, ways) as started:
            quiet = in_turn(started, asked)
            with neighbour():
                busy = in_turn(started, asked)
        for way in ways:
            (alone, alone_cpu), (beside, beside_cpu) = quiet[way], busy[way]
            print(
                f"| {size} | {way} | {alone:.1f} ({alone_cpu:.1f}) | {beside:.1f} "
                f"({beside_cpu:.1f}) | {beside / alone:.2f} |",
                flush=True,
            )


def in_turn(started: dict, asked: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Medians over the repeats of the milliseconds of a step by clock and by CPU."""
    seen: dict[str, list[list[float]]] = {way: [] for way in started}
    for repeat in range(asked.repeats + 1):
        for way, process in started.items():
            process.stdin.write(f"{asked.steps if repeat else 2}\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            if repeat:  # the first warms up
                seen[way].append(answer)
    return {
        way: tuple(statistics.median(column) for column in zip(*rows)) for way, rows in seen.items()
    }


@contextmanager
def workers(size: str, ways: dict[str, dict[str, str]]):
    """A process for each way of waiting, ready for its first order."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, __file__, "--worker", size]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = {
        way: subprocess.Popen(command, env={**plain, **settings}, **pipes)
        for way, settings in ways.items()
    }
    try:
        yield started
    finally:
        for process in started.values():
            process.kill()
            process.wait()


@contextmanager
def neighbour():
    """One process that keeps all cores busy."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    process = subprocess.Popen([sys.executable, "-c", NEIGHBOUR], env=plain)
    time.sleep(5)  # until it multiplies
    try:
        yield
    finally:
        process.kill()
        process.wait()


def work(size: str) -> None:
    """Train a random Llama; each line of stdin orders so many steps and is answered by the
    milliseconds of one, by clock and by CPU.
    """
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    shape = LlamaConfig(**SHAPES[size], num_attention_heads=6, vocab_size=256)
    model = AutoModelForCausalLM.from_config(shape)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, 256, (ROWS, TOKENS))
    for line in sys.stdin:
        steps = int(line)
        clock, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        spent = time.perf_counter() - clock, time.process_time() - cpu
        print(json.dumps([1000 * seconds / steps for seconds in spent]), flush=True)


if __name__ == "__main__":
    main()
