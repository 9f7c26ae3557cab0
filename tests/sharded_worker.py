"""Run by torchrun in tests: sharded runs on this many processes, whole ones and resumed ones."""

import shutil
import sys
from pathlib import Path

from accelerate import Accelerator
from ddp_worker import distilled, dpo, kto, rpg, run_case, turns

from alignkit.distributed.launcher import end

SHARDED = {"shard": True, "optimizer": "sgd"}
LORA = {"lora": True, "reference": "adapter_off"}
CASES = {
    "dpo": (dpo, {**SHARDED, "save_every": 2}),
    "dpo_lora": (dpo, {**SHARDED, **LORA}),
    "kto": (kto, SHARDED),
    "kto_lora": (kto, {**SHARDED, **LORA}),
    "rpg": (rpg, {**SHARDED, "learning_rate": 0.1}),
    "rpg_lora": (rpg, {**SHARDED, **LORA, "learning_rate": 0.1}),
    "turns": (turns, {**SHARDED, "learning_rate": 0.1}),
    "distill": (distilled, {**SHARDED, "budget": 24}),
    "adamw": (dpo, {"shard": True, "save_every": 2, "ema_decay": 0.5, "reference": "ema"}),
}


def run(case: str, model: Path, out: Path, resume: str | None = None, **more) -> None:
    """One case in `out/case`; `out/case.safetensors` are its final weights."""
    make, settings = CASES[case]
    run_case(case, make, {**settings, **more}, model, out, resume)


def take_up(case: str, source: Path, out: Path) -> None:
    """`out/case` with nothing but the second step's checkpoint of `source/case`."""
    (out / case / "checkpoints").mkdir(parents=True)
    name = f"{case}/checkpoints/step-2"
    shutil.copytree(source / name, out / name)
    shutil.copy(source / case / "metrics.jsonl", out / case / "metrics.jsonl")


if __name__ == "__main__":
    model, out, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    more = {}
    if len(sys.argv) > 4:
        sizes = (size.split("=") for size in sys.argv[4].split(","))
        more["mesh"] = {name: int(size) for name, size in sizes}
    for name in names.split(","):
        resume = "auto" if (out / name).exists() else None
        run(name, model, out, resume, **more)
    end(Accelerator(cpu=True))
