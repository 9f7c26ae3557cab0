"""Part of ddp_worker.py: an online run on this many processes, and the same run taken up in the
middle of a rollout.
"""

import shutil
from pathlib import Path

from accelerate import Accelerator
from online_world import online_job
from safetensors.torch import save_file

from alignkit.objectives.online.kl_ppo import KLPPO
from alignkit.training.loop import train

# 10 prompts per rollout, which serves steps 1-4 or 5-8: twice in two minibatches of 5 prompts, of
# any ranks'
OBJECTIVE = KLPPO(beta=0.1, epochs=2, minibatches=2, kl_target=0.5, kl_horizon=20)
SETTINGS = {"steps": 7, "save_every": 1, "keep": 99, "optimizer": "sgd", "learning_rate": 0.5}
TAKEN_UP = 6


def run(model: Path, out: Path, resume: str | None = None) -> None:
    """One run in `out`; the main process writes its weights to `weights.safetensors`."""
    job = online_job(model, out, OBJECTIVE, prompts_per_step=5, **SETTINGS)
    with job.run:
        train(job, resume)
    if job.accelerator.is_main_process:
        save_file(job.pair.state(), out / "weights.safetensors")


def copy_checkpoint(source: Path, out: Path) -> None:
    """A run folder with nothing but the checkpoint in the middle of a rollout, and the metrics up
    to there.
    """
    shutil.copytree(
        source / "checkpoints" / f"step-{TAKEN_UP}", out / "checkpoints" / f"step-{TAKEN_UP}"
    )
    shutil.copy(source / "metrics.jsonl", out / "metrics.jsonl")


def main(model: Path, out: Path, accelerator: Accelerator) -> None:
    """The whole run in `out/whole`, and `out/resumed`, taken up from its checkpoint."""
    run(model, out / "whole")
    if accelerator.is_main_process:
        copy_checkpoint(out / "whole", out / "resumed")
    accelerator.wait_for_everyone()
    run(model, out / "resumed", "auto")
