"""What reliability costs: the finite guard in every step, and SHA-256 in every checkpoint, as
shares of a DPO step.

    python tests/benchmarks/bench_guard.py [--steps 6] [--size 15M] [--batch 8]

Processor time of this process, on GSM8K pairs with a live reference. The table goes to stdout as
Markdown.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from bench_dpo import Ours
from world import pairs, write_world

from alignkit import files
from alignkit.config.train import TrainConfig
from alignkit.training import checkpoint
from alignkit.training.guard import Guard
from alignkit.training.snapshot import optimizer_state

LIMIT = 0.02  # of a step


class Clock:
    """Adds up the processor time inside the functions it has been put around."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, owner: object, name: str) -> None:
        inner = getattr(owner, name)

        def timed(*args, **kwargs):
            began = time.process_time()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - began

        setattr(owner, name, timed)


def main() -> None:
    """Measure and print the table; exit 1 above the limit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--size", default="15M")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    guard, hashing = Clock(), Clock()
    for name in ("watch_logps", "watch_terms", "check"):
        guard.around(Guard, name)
    hashing.around(files, "sha256_of_files")
    with tempfile.TemporaryDirectory() as place:
        ours = Ours(
            write_world(Path(place), options.size),
            pairs(options.steps * options.batch),
            options.batch,
            "float32",
        )
        steps, shares = [], []
        for index in range(options.steps):
            began, before = time.process_time(), guard.seconds
            ours.step(index)
            steps.append(time.process_time() - began)
            shares.append((guard.seconds - before) / steps[-1])
        moments, groups = optimizer_state(ours.optimizer)
        began, wall = time.process_time(), time.monotonic()
        path = checkpoint.save(
            Path(place) / "saved",
            1,
            {"policy": ours.pair.state(), "optimizer": moments},
            groups,
            {},
        )
        saving, waiting = time.process_time() - began, time.monotonic() - wall
        size = sum(file.stat().st_size for file in path.iterdir()) / 2**20
    step, every = statistics.median(steps), TrainConfig().save_every
    rows = [
        ("finite guard, every step", statistics.median(shares) * step, statistics.median(shares)),
        (
            f"SHA-256 of a checkpoint of {size:.0f} MiB, every {every} steps",
            hashing.seconds,
            hashing.seconds / every / step,
        ),
        ("the whole save", saving, saving / every / step),
    ]
    print(
        f"{options.size} parameters, {options.batch} pairs and {step:.2f} s per step; a save took {waiting:.2f} s of wall time"
    )
    print("\n| what | seconds | share of a step |\n|---|---|---|")
    for name, seconds, share in rows:
        print(f"| {name} | {seconds:.4f} | {share:.3%} |")
    if rows[0][2] + rows[1][2] > LIMIT:
        raise SystemExit(f"guard and hashing together take more than {LIMIT:.0%} of a step")


if __name__ == "__main__":
    main()
