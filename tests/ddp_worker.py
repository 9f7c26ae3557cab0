"""Run by torchrun in tests: the loop on this many processes; the main one writes weights and metrics of each case."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from test_online import online_job
from torch.distributed.tensor import DTensor
from world import make_job, pairs

from alignkit.errors import NumericsError
from alignkit.loop import train
from alignkit.objectives.dpo import DPO
from alignkit.objectives.kto import KTO
from alignkit.objectives.rpg import RPG
from alignkit.processes import end

SGD = {"optimizer": "sgd", "learning_rate": 0.5}
BROKEN_STEP = 3


def dpo(model, out, accelerator, **settings):
    """6 rows per step of uneven lengths: ranks need different numbers of micro-batches. The second has no row to evaluate."""
    settings = {"evaluation": pairs(1, seed=5) if accelerator.is_main_process else [], "eval_every": 2, **settings}
    return make_job(model, out, DPO(beta=0.5), pairs(20), accelerator=accelerator, batch_size=6, steps=4, **settings)


def kto(model, out, accelerator, **settings):
    """Coupled: every row is compared with a baseline over the whole step. The second rank has no row to evaluate here either."""
    rows = pairs(20, k=1, label=lambda i: torch.tensor([i % 3 > 0]))
    held_out = rows[:1] if accelerator.is_main_process else []
    settings = {"evaluation": held_out, "eval_every": 2, "learning_rate": 0.05, **settings}
    return make_job(model, out, KTO(beta=0.5), rows, accelerator=accelerator, batch_size=6, steps=4, **settings)


def rpg(model, out, accelerator, **settings):
    """5 prompts per rollout: 3 for the first rank, 2 for the second."""
    return online_job(model, out, RPG(beta=0.1), prompts_per_step=5, steps=4, **settings)


CASES = {
    "adamw": (dpo, {"optimizer": "adamw"}),
    "sgd": (dpo, SGD),
    "tiny_budget": (dpo, {**SGD, "budget": 24}),
    "lora": (dpo, {**SGD, "lora": True, "reference": "adapter_off", "budget": 24}),
    "kto": (kto, {"optimizer": "sgd", "budget": 24}),
    "rpg": (rpg, {"optimizer": "sgd", "learning_rate": 0.1}),
    "fsdp_dpo": (dpo, {"shard": True, "save_every": 2}),
    "fsdp_ema": (dpo, {"shard": True, "reference": "ema", "ema_decay": 0.5, "budget": 24}),
    "fsdp_lora": (dpo, {"shard": True, "lora": True, "reference": "adapter_off", "budget": 24}),
    "fsdp_kto": (kto, {"shard": True, "budget": 24}),
    "fsdp_rpg": (rpg, {"shard": True, "save_every": 2}),
}


def a_logit(pair) -> float:
    with pair.model("policy") as network, torch.no_grad():
        return float(network(torch.tensor([[3, 4, 5]])).logits[0, -1, 6])


def run(case: str, model: Path, out: Path, resume: str | None = None) -> None:
    """One case in `out/case`; `out/case.safetensors` are its final weights."""
    make, settings = CASES[case]
    accelerator = Accelerator(cpu=True)
    job = make(model, out / case, accelerator, **settings)
    job.samples = lambda step: [{"step": step, "logit": a_logit(job.pair)}]  # on the first process alone
    with job.run:
        train(job, resume)
    shards = [isinstance(p, DTensor) for p in job.pair.parameters()]
    assert set(shards) == {case.startswith("fsdp") and accelerator.num_processes > 1}
    weights = job.pair.state()
    if accelerator.is_main_process:
        save_file(weights, out / f"{case}.safetensors")


def break_one_rank(model: Path, out: Path) -> None:
    """A log-prob that is not a number, on the last rank only; every rank writes how it ended."""
    accelerator = Accelerator(cpu=True)
    job = dpo(model, out / "broken", accelerator, save_every=1)
    collect, logps = job.source.collect, job.pair.logps
    now = {}

    def spoilt(bundles, plan, **options):
        tokens = logps(bundles, plan, **options)
        if now["step"] == BROKEN_STEP - 1 and accelerator.process_index == accelerator.num_processes - 1:
            tokens.policy.data[0, 0] = torch.nan
        return tokens

    job.source.collect = lambda step, half: (now.update(step=step), collect(step, half))[1]
    job.pair.logps = spoilt
    try:
        with job.run:
            train(job)
    except NumericsError as error:
        (out / f"broken-{accelerator.process_index}.json").write_text(json.dumps([error.exit_code, str(error)]))


if __name__ == "__main__":
    model, out = map(Path, sys.argv[1:])
    for case in CASES:
        run(case, model, out)
    break_one_rank(model, out)
    end(Accelerator(cpu=True))
