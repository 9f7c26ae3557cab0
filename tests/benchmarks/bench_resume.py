"""What it costs to resume a run whose metrics.jsonl is long.

    python tests/benchmarks/bench_resume.py [--rows 1000000]

Runs DPO on a few pairs for four steps, takes the model away, and resumes the run for one step more:
with the four rows that it wrote, and with many rows before them. Seconds, seconds of processor time
and peak memory are those of the whole command, imports included. The table goes to stdout as
Markdown.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from alignkit.files import write_jsonl
from alignkit.tasks import resolve

SETTINGS = [
    "model.name_or_path=task",
    "reference.kind=frozen",
    "data.max_length=64",
    "train.batch_size=4",
    "train.save_every=2",
    "train.eval_every=0",
    "train.log_samples_every=0",
]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    rows = parser.parse_args().rows

    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| rows before | MB | s | CPU s | peak MiB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        write_jsonl(
            Path(folder) / "pairs.jsonl", resolve("task:reviews").rows("pair", "train")[:64]
        )
        train(run, 4)
        own_rows = (run / "metrics.jsonl").read_bytes()
        first = own_rows.partition(b"\n")[0] + b"\n"

        for number in (0, rows):
            resumed = Path(folder) / f"resumed-{number}"
            shutil.copytree(run, resumed)
            shutil.rmtree(resumed / "model")
            # In parts: a process that is started counts its parent's memory as its own peak.
            with (resumed / "metrics.jsonl").open("wb") as log:
                log.writelines(first for _ in range(number))
                log.write(own_rows)
            size = (resumed / "metrics.jsonl").stat().st_size / 1e6
            seconds, busy, peak = train(resumed, 5, "--resume", "auto")
            print(
                f"| {number:,} | {size:.1f} | {seconds:.2f} | {busy:.2f} | {peak:.0f} |", flush=True
            )


def train(run: Path, steps: int, *options: str) -> tuple[float, float, float]:
    """Seconds, processor seconds and peak MiB of one `alignkit train`."""
    command = [sys.executable, "-m", "alignkit", "train", "dpo", f"output_dir={run}"]
    command += [f"data.train={run.parent / 'pairs.jsonl'}"]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, f"train.steps={steps}", *SETTINGS, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"alignkit train ended with status {status}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
