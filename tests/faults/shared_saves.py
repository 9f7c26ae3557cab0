"""Run by a test: two processes save their shards again and again, until one of them is killed.

Processes are forked from this one, which has imported torch and started no thread, so that a repeat
takes a second.
"""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from alignkit.training import checkpoint, shared_checkpoint

PROCESSES = 2
ROWS = 3001  # the last process has one row less
WIDTH = 128
LONGEST = 0.5  # seconds after the first checkpoint


def content(step: int) -> torch.Tensor:
    """What the checkpoint of a step has to hold."""
    return torch.arange(ROWS * WIDTH, dtype=torch.float32).view(ROWS, WIDTH) + step


def save_forever(folder: Path) -> None:
    """One process: checkpoint after checkpoint."""
    accelerator = Accelerator(cpu=True)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    step = 0
    while True:
        step += 1
        tensors = {"policy": {"weight": distribute_tensor(content(step), mesh, [Shard(0)])}}
        shared_checkpoint.save(folder, step, tensors, {"step": step}, {"run": 1}, accelerator)
        if accelerator.is_main_process:
            checkpoint.prune(folder, step, keep=2)


def forked(rank: int, port: int, folder: Path) -> int:
    """The id of a process of that rank."""
    process = os.fork()
    if process:
        return process
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it says at length that its peer is gone
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(PROCESSES),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        save_forever(folder)
    finally:
        os._exit(1)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def repeat(folder: Path, rng: random.Random) -> dict[str, bool]:
    """Kill a random process at a random moment, and look at what is left."""
    folder.mkdir(parents=True)
    port = free_port()
    processes = [forked(rank, port, folder) for rank in range(PROCESSES)]
    while not checkpoint.steps(folder):
        time.sleep(0.01)
    time.sleep(rng.random() * LONGEST)

    victim = rng.randrange(PROCESSES)
    in_a_save = bool(list(folder.glob(".tmp-step-*")))
    os.kill(processes[victim], signal.SIGKILL)
    time.sleep(rng.random() * 0.2)  # the other one goes on for a while, as it would
    for process in processes:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)

    broken = [verdict.reason for verdict in checkpoint.verify(folder) if verdict.reason]
    newest, _ = checkpoint.newest(folder)
    whole = newest is not None and torch.equal(
        newest.tensors["policy"]["weight"], content(newest.step)
    )
    return {"whole": whole and not broken, "in a save": in_a_save, "first": victim == 0}


if __name__ == "__main__":
    out, repeats, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    print(json.dumps([repeat(out / str(number), rng) for number in range(repeats)]))
