"""Run by torchrun in tests: short runs inside TRL's trainers on this many processes, the same rows
in every step.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from trl import DPOTrainer, GRPOTrainer
from trl_world import curve, dpo_trainer, grpo_trainer

from alignkit.distributed.launcher import end
from alignkit.integrations.trl import as_trl_trainer
from alignkit.objectives.base import Weighted
from alignkit.objectives.online.grpo import GRPO
from alignkit.objectives.online.rpg import RPG
from alignkit.objectives.preference.dpo import DPO
from alignkit.objectives.preference.radpo import RaDPO
from alignkit.objectives.preference.sft import SFT


@dataclass(frozen=True)
class Case:
    objective: Any
    base: type = DPOTrainer
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "dpo": Case(DPO(beta=0.1)),
    "lora": Case(RaDPO(beta=0.2, risk="cvar", level=0.7), options={"tune": "pretrained"}),
    "tokens": Case(
        Weighted(parts=[(DPO(beta=0.1), 1.0), (SFT(), 0.3)])
    ),  # SFT's term is per token of all processes
    "grpo": Case(GRPO(beta=0.1, kl="k3"), GRPOTrainer, {"beta": 0.1}),
    "rpg": Case(RPG(beta=0.1, kl_credit="token"), GRPOTrainer),  # token_mean: the same
}


def told_apart(rank: int, local: int):
    """A stand-in for sampling: the completion is a function of the prompt and of the row's place in
    its group of 4.
    """

    def generate(input_ids=None, generation_config=None, **_):
        rows = []
        for i, prompt in enumerate(input_ids):
            place = (rank * local + i) % 4
            noise = torch.Generator().manual_seed(int(prompt.sum()) * 7 + place)
            rows.append(
                torch.randint(3, 23, (5,), generator=noise).index_fill(
                    0, torch.tensor([2 + place % 3]), 2
                )
            )
        return torch.cat([input_ids, torch.stack(rows)], 1)

    return generate


def run(model: Path, out: Path, world: int, rank: int = 0) -> dict[str, torch.Tensor]:
    """Case -> losses and gradient norms [steps, 2]. The batch of all processes together does not
    depend on their number.
    """
    found = {}
    for name, case in CASES.items():
        cls = as_trl_trainer(case.objective, case.base)
        make, rows = (dpo_trainer, 2) if case.base is DPOTrainer else (grpo_trainer, 4)
        trainer = make(
            cls, model, out / name, per_device_train_batch_size=rows // world, **case.options
        )
        if case.base is GRPOTrainer:
            trainer.model.generate = told_apart(rank, rows // world)
        found[name] = curve(trainer)
    return found


def load(out: Path) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor(rows, dtype=torch.float64)
        for name, rows in json.loads((out / "found.json").read_text()).items()
    }


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model, out = map(Path, sys.argv[1:])
    found = run(model, out, world, rank)
    if rank == 0:
        (out / "found.json").write_text(
            json.dumps({name: rows.tolist() for name, rows in found.items()})
        )
    end(Accelerator(cpu=True))
