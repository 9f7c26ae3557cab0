"""What a teacher costs: distillation from a live teacher of the policy's size and from a stored
top-64 one beside plain SFT on the same rows, in turn, in one process.

    python tests/benchmarks/bench_teacher.py [--steps 7] [--size 15M] [--vocab 8192] [--memory]

On GSM8K answers; memory in a process of each. The tables go to stdout as Markdown. Ends with 1 where
a live teacher takes more memory than its weights and two chunks of the head beside SFT.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from world import GPU, SHAPES, clock, measured_alone, pairs, peak_memory, write_world

from alignkit import SFT, Distill
from alignkit.batches import Bundle
from alignkit.config.data import DataConfig
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.config.teacher import TeacherConfig
from alignkit.config.train import TrainConfig
from alignkit.data.load import load_bundles
from alignkit.policies.head import chunk_rows
from alignkit.policies.load import load_model, load_pair
from alignkit.policies.packing import default_budget
from alignkit.policies.teacher import add_teacher
from alignkit.policies.teacher_store import release_teacher, with_stored_teacher
from alignkit.training.optimizer import make_optimizer
from alignkit.training.reduction import Reducer

BATCH = 8
TOP = 64
SIDES = {
    "SFT": SFT(),
    f"stored, top {TOP}": Distill(),
    "live, forward KL": Distill(),
    "live, reverse KL": Distill(divergence="reverse_kl"),
}


class Side:
    """A training step with the loop's own reducer and optimiser."""

    def __init__(self, name: str, folder: Path, steps: int):
        objective = SIDES[name]
        accelerator = Accelerator(cpu=not GPU)
        model = ModelConfig(name_or_path=str(folder / "policy"))
        self.pair = load_pair(
            model,
            ReferenceConfig(),
            None,
            objective.plan,
            device=accelerator.device,
            fixed_data=True,
        )
        rows = [
            {"prompt": row["prompt"], "completion": " " + row["chosen"]}
            for row in pairs(BATCH * steps)
        ]
        bundles, _ = load_bundles(DataConfig(), "sequence", self.pair.tokenizer, source=rows)

        if objective.plan.needs_teacher:
            bundles = self._with_teacher(name, bundles, str(folder / "teacher"), model)

        self.batches = [bundles[i : i + BATCH] for i in range(0, len(bundles), BATCH)]
        make = partial(make_optimizer, TrainConfig(learning_rate=1e-5))
        self.optimizer = self.pair.prepare(accelerator, make)
        budget = default_budget(accelerator.device, self.pair.packing)
        self.reducer = Reducer(objective, self.pair, accelerator, budget, 1.0)

    def _with_teacher(
        self, name: str, bundles: Sequence[Bundle], folder: str, model: ModelConfig
    ) -> Sequence[Bundle]:
        """The bundles, and the teacher where it stays."""
        if not name.startswith("stored"):
            add_teacher(self.pair, TeacherConfig(name_or_path=folder), model)
            return bundles

        teacher = TeacherConfig(name_or_path=folder, top=TOP)
        stored = with_stored_teacher(self.pair, bundles, teacher, model)
        release_teacher(self.pair)
        return stored

    def step(self, index: int) -> None:
        """One optimiser step."""
        self.reducer.backward(self.batches[index])
        self.optimizer.step()
        self.optimizer.zero_grad()


def write_models(folder: Path, size: str, vocab: int) -> None:
    """A policy and a teacher of random weights and one size."""
    write_world(folder / "policy", size, vocab)
    shutil.copytree(folder / "policy", folder / "teacher")


def memory_of(name: str, folder: Path) -> float:
    """MiB at the peak of two steps, without what loading took for a while."""
    side = Side(name, folder, 3)
    side.step(0)  # optimiser state and buffers are there from here on
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    side.step(1)
    side.step(2)
    return peak_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--size", default="15M", choices=SHAPES)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--memory", action="store_true", help="memory alone, without times")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        print(json.dumps({"memory": memory_of(given.alone, Path(given.folder))}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, given.size, given.vocab)
        if not given.memory:
            report_time(folder, given)
        report_memory(folder, given)


def report_time(folder: Path, given: argparse.Namespace) -> None:
    """Time all sides in turn and print the table."""
    sides = {name: Side(name, folder, given.steps) for name in SIDES}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(given.steps):
        for name, side in sides.items():
            began, used = clock(), time.process_time()
            side.step(index)
            wall[name].append(clock() - began)
            cpu[name].append(time.process_time() - used)

    print(
        f"\nGSM8K answers, batch {BATCH}, {given.size}, vocabulary {given.vocab}, float32, medians "
        f"of {given.steps - 1} steps\n"
    )
    print("| side | s per step | of SFT's | CPU s | of SFT's |\n|---|---|---|---|---|")
    for name in SIDES:
        # Ratios step by step: neighbours in time share the machine's mood.
        cells = []
        for seconds in (wall, cpu):
            ratios = [own / base for own, base in zip(seconds[name][1:], seconds["SFT"][1:])]
            cells += [f"{statistics.median(seconds[name][1:]):.3f}"]
            cells += [f"{statistics.median(ratios):.2f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def report_memory(folder: Path, given: argparse.Namespace) -> None:
    """Print the peak memory of a step of every side, and what a live teacher may take."""
    teacher = ModelConfig(name_or_path=str(folder / "teacher"))
    weights = sum(p.numel() for p in load_model(teacher, device="cpu")[0].parameters()) / 2**18
    chunk = chunk_rows(given.vocab, torch.device("cuda" if GPU else "cpu")) * given.vocab / 2**18
    allowed = weights + 2 * chunk
    print(
        f"\nPeak memory of a step; the teacher's weights take {weights:.0f} MiB and a chunk of the "
        f"head {chunk:.0f} MiB, so a live teacher may take {allowed:.0f} MiB\n"
    )
    print("| side | MiB | above SFT's |\n|---|---|---|")
    memory: dict[str, float] = {}
    for name in SIDES:
        memory[name] = measured_alone(__file__, "--alone", name, "--folder", str(folder))["memory"]
        print(f"| {name} | {memory[name]:.1f} | {memory[name] - memory['SFT']:.1f} |", flush=True)

    over = [n for n in SIDES if n.startswith("live") and memory[n] - memory["SFT"] > allowed]
    if over:
        raise SystemExit(f"above {allowed:.1f} MiB: {', '.join(over)}")


if __name__ == "__main__":
    main()
