"""Run by torchrun in tests: the loop on this many processes; the main one writes weights and metrics of each case."""

import json
import sys
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import save_file
from world import make_job, pairs

from alignkit.loop import train
from alignkit.objectives.dpo import DPO

CASES = {
    "adamw": {"optimizer": "adamw"},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.5},
    "tiny_budget": {"optimizer": "sgd", "learning_rate": 0.5, "budget": 24},
    "lora": {"optimizer": "sgd", "learning_rate": 0.5, "lora": True, "reference": "adapter_off"},
}


def run(case: str, model: Path, out: Path) -> None:
    accelerator = Accelerator(cpu=True)
    # 6 rows per step on 2 ranks, of uneven lengths: ranks need different numbers of micro-batches
    job = make_job(model, out / case, DPO(beta=0.5), pairs(20), accelerator=accelerator, batch_size=6, steps=4, **CASES[case])
    with job.run:
        train(job)
    if accelerator.is_main_process:
        save_file(job.pair.state(), out / f"{case}.safetensors")


if __name__ == "__main__":
    model, out, *cases = sys.argv[1:]
    for case in cases or CASES:
        run(case, Path(model), Path(out))
    (Path(out) / "done.json").write_text(json.dumps(cases))
