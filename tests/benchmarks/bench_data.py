"""What many rows cost: `alignkit data check` twice, and the start of a DPO run on them.

    python tests/benchmarks/bench_data.py [--rows 100000]

The pairs of ../shared/data, repeated with changed texts, and the story model's tokenizer. The cache is
a new folder. Seconds, processor seconds and peak memory are those of whole commands, imports
included; the first row of the table is the run on 100 pairs. It goes to stdout as Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
MODEL = DATA / "stories260k"
SETTINGS = [
    f"model.name_or_path={MODEL}",
    "train.steps=1",
    "train.batch_size=4",
    "train.eval_every=0",
    "train.save_every=0",
    "train.log_samples_every=0",
]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    number = parser.parse_args().rows

    print(f"\n{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {number:,} pairs\n")
    print("| command | s | CPU s | peak MiB |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["ALIGNKIT_CACHE"] = str(folder / "cache")
        few = write(folder / "few.jsonl", 100)
        many = write(folder / "many.jsonl", number)
        checking = ["data", "check", str(many), "--model", str(MODEL), "--family", "pair"]
        frozen = "reference.kind=frozen"
        stored = f"reference.store={folder / 'store'}"

        measure("dpo, 100 pairs", train(folder / "a", few, frozen))
        measure("data check", checking)
        measure("data check again", checking)
        measure("dpo, frozen reference", train(folder / "b", many, frozen))
        measure("dpo, store is filled", train(folder / "c", many, stored))
        measure("dpo, filled store", train(folder / "d", many, stored))


def write(path: Path, number: int) -> Path:
    """So many pairs, no two of them equal."""
    lines = (DATA / "stories_sentiment" / "preferences_train.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    with path.open("w") as file:
        for i in range(number):
            pair = pairs[i % len(pairs)]
            row = {key: f"{pair[key]} {i}" for key in ("chosen", "rejected")}
            file.write(json.dumps({"prompt": pair["prompt"], **row}) + "\n")
    return path


def train(run: Path, rows: Path, *options: str) -> list[str]:
    """The arguments of a run of one step."""
    return ["train", "dpo", f"output_dir={run}", f"data.train={rows}", *SETTINGS, *options]


def measure(name: str, arguments: list[str]) -> None:
    """Run `alignkit` and print a row of the table."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "alignkit", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{name}: alignkit ended with status {status}")
    busy = usage.ru_utime + usage.ru_stime
    print(f"| {name} | {seconds:.1f} | {busy:.1f} | {usage.ru_maxrss / 1024:.0f} |", flush=True)


if __name__ == "__main__":
    main()
