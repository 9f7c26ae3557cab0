"""A sweep of 8 DPO-family runs on one dataset: the reference scored once for all, against once for
each run.

    python tests/benchmarks/bench_sweep.py [--rows 64] [--size 15M]

Whole runs through `run_recipe`, one pass over the rows each, the two kinds in turn. The table goes
to stdout as Markdown.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

from world import SHAPES, pairs, write_world

from alignkit.config.recipe import load_recipe
from alignkit.runs.launch import run_recipe

SWEEP = [
    f"objective={{name: {name}, beta: {beta}}}"
    for name in ("dpo", "hdpo", "fdpo", "robust_dpo")
    for beta in (0.1, 0.3)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--size", default="15M", choices=SHAPES)
    parser.add_argument("--vocab", type=int, default=8192)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        report(write_world(Path(name), given.size, given.vocab), given)


def report(folder: Path, given: argparse.Namespace) -> None:
    """Run both sweeps run by run in turn and print the table."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs(given.rows)))
    seconds = {"scored once for each run": 0.0, "scored once for all": 0.0}
    for i, objective in enumerate(SWEEP):
        for kind in seconds:
            store = [f"reference.store={folder / 'store'}"] if kind.endswith("all") else []
            settings = [
                f"model.name_or_path={folder}", f"data.train={data}", f"output_dir={folder / kind / str(i)}", objective, *store,
                "reference.kind=cached", "train.epochs=1", "train.batch_size=8", "train.save_every=0", "train.eval_every=0",
                "train.log_samples_every=0",
            ]  # fmt: skip
            began = time.perf_counter()
            with contextlib.redirect_stderr(io.StringIO()):
                run_recipe(load_recipe("dpo", settings))
            seconds[kind] += time.perf_counter() - began
    separate, shared = seconds.values()
    print(
        f"\n{len(SWEEP)} runs over {given.rows} GSM8K pairs, batch 8, {given.size} Llama, vocabulary {given.vocab}, float32\n"
    )
    print("| reference | s |\n|---|---|")
    for kind, total in seconds.items():
        print(f"| {kind} | {total:.1f} |")
    print(f"\nShare: {shared / separate:.3f}")


if __name__ == "__main__":
    main()
