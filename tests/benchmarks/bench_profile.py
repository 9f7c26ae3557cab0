"""Where the time of a DPO step goes, by torch's profiler: matrix products, attention, everything else.

    python tests/benchmarks/bench_profile.py [--size 15M] [--vocab 8192]

The table goes to stdout as Markdown.
"""

import argparse
import tempfile
from pathlib import Path

from accelerate.state import AcceleratorState
from bench_dpo import DATA_SETS, Ours
from torch.profiler import ProfilerActivity, profile
from world import SHAPES, write_world

KINDS = {  # the first kind of which a word is in an operator's name
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("scaled_dot_product",),
    "log-softmax": ("log_softmax",),
    "copies": ("copy_", "cat", "clone", "fill_"),
    "optimiser": ("adam",),
}
REST = "elementwise and the rest"


def shares(side: Ours) -> dict[str, float]:
    """Kind -> share of the processor time of the second step."""
    side.step(0)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        side.step(1)
    events = found.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    result = dict.fromkeys([*KINDS, REST], 0.0)
    for event in events:
        kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), REST)
        result[kind] += event.self_cpu_time_total / total
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="15M", choices=SHAPES)
    parser.add_argument("--vocab", type=int, default=8192)
    given = parser.parse_args()
    print(f"\nA DPO step, batch 8, {given.size}, vocabulary {given.vocab}, live reference: shares of the processor's time\n")
    print(f"| data | dtype | {' | '.join([*KINDS, REST])} |")
    print("|---" * (3 + len(KINDS)) + "|")
    with tempfile.TemporaryDirectory() as name:
        folder = write_world(Path(name), given.size, given.vocab)
        for data in DATA_SETS:
            for dtype in ("float32", "bfloat16"):
                AcceleratorState._reset_state()  # it holds the precision of the run before
                found = shares(Ours(folder, DATA_SETS[data](16), 8, dtype))
                print(f"| {data} | {dtype} | {' | '.join(f'{share:.2f}' for share in found.values())} |", flush=True)


if __name__ == "__main__":
    main()
