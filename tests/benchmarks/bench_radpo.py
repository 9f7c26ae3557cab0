"""What a statistic over the whole vocabulary costs: Ra-DPO beside DPO with a live reference, in
turn, in one process.

    python tests/benchmarks/bench_radpo.py [--steps 6] [--size 15M] [--vocab 32000]

On GSM8K pairs; peak memory in a process of each. The table goes to stdout as Markdown.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from bench_dpo import Ours
from world import SHAPES, measured_alone, pairs, peak_memory, write_world

from alignkit.objectives.preference.dpo import DPO
from alignkit.objectives.preference.radpo import RaDPO

OBJECTIVES = {
    "DPO": DPO(beta=0.1),
    "Ra-DPO, kl": RaDPO(beta=0.1, risk="kl"),
    "Ra-DPO, cvar": RaDPO(beta=0.1, risk="cvar"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--size", default="15M", choices=SHAPES)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        side = Ours(Path(given.folder), pairs(8 * 3), 8, "float32", OBJECTIVES[given.alone])
        for index in range(3):
            side.step(index)
        print(json.dumps({"memory": peak_memory()}))
        return
    with tempfile.TemporaryDirectory() as name:
        report(write_world(Path(name), given.size, given.vocab), given)


def report(folder: Path, given: argparse.Namespace) -> None:
    """Time all in turn and print the table."""
    memory = {
        name: measured_alone(__file__, "--alone", name, "--folder", str(folder))["memory"]
        for name in OBJECTIVES
    }
    sides = {
        name: Ours(folder, pairs(8 * given.steps), 8, "float32", objective)
        for name, objective in OBJECTIVES.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(given.steps):
        for name, side in sides.items():
            began = time.perf_counter()
            side.step(index)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    print(
        f"\nGSM8K pairs, batch 8, {given.size} Llama, vocabulary {given.vocab}, float32, medians of {given.steps - 1} steps\n"
    )
    print("| objective | s per step | of DPO's | MiB | of DPO's |\n|---|---|---|---|---|")
    for name in sides:
        time_share, memory_share = medians[name] / medians["DPO"], memory[name] / memory["DPO"]
        print(
            f"| {name} | {medians[name]:.2f} | {time_share:.2f} | {memory[name]:.0f} | {memory_share:.2f} |"
        )


if __name__ == "__main__":
    main()
