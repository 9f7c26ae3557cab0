"""Starting `alignkit --processes N --machines M`, and leaving the process group at the end.

The same command line runs once per process, supervised by torch's elastic agent: if one process
fails, it stops the others.
"""

import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import uuid4

from alignkit.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("alignkit")

# Seconds that gloo's threads get to finish; one that waits for the GIL has it within 5 ms.
LAST_WORK = 0.2


RESTARTS = 3  # of all processes, where there are several machines and one of them fails
RUN_ID = "ALIGNKIT_JOB"  # the environment variable that tells two jobs at one address apart


@dataclass(frozen=True)
class Machines:
    """The machines of a job: at least and at most how many, and where they meet (HOST:PORT of the
    first).
    """

    least: int
    most: int
    first: str


def machines_of(given: str, first: str | None) -> Machines | None:
    """What `--machines N` or `--machines MIN:MAX` and `--first` mean; None for one machine.
    ConfigError.
    """
    parts = given.split(":")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--machines {given}: give a number such as 8, or a range such as 4:8")
    least = int(parts[0])
    most = int(parts[-1])
    if least > most:
        raise ConfigError(f"--machines {given}: the range goes from few to many, such as 4:8")
    if most == 1:
        return None

    host, _, port = (first or "").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"--machines {given}: the machines meet at the first one; give its address to all of "
            f"them, such as --first node0:29500 (given: {first})"
        )
    return Machines(least, most, f"{host}:{port}")


def launch(processes: int, arguments: Sequence[str], machines: Machines | None = None) -> int:
    """Run `alignkit ARGUMENTS` in `processes` processes of this machine, and of others that run the
    same command.

    With several machines, all processes start again together where one fails, up to RESTARTS times,
    on those machines that are left. Returns the exit code: 0, or that of the process that failed
    first (128 + n for signal n).
    """
    import torch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # On a CPU the processes share the cores between them.
    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _usable_cores() // processes)))

    # After a signal every process finishes its step and saves it; that may take some minutes.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")

    config = LaunchConfig(
        min_nodes=machines.least if machines else 1,
        max_nodes=machines.most if machines else 1,
        nproc_per_node=processes,
        run_id=os.environ.get(RUN_ID, "alignkit") if machines else uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=machines.first if machines else "127.0.0.1:0",
        local_addr=None if machines else "127.0.0.1",
        max_restarts=RESTARTS if machines else 0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "alignkit", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        log.error(
            "alignkit: process %d ended with exit code %d; the others were stopped",
            rank,
            failure.exitcode,
        )
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _usable_cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def end(accelerator: "Accelerator") -> None:
    """Leave the process group; every script that trains in several processes calls it at its end.

    A gloo thread drops its last piece of work after the caller has its result, and needs the GIL
    for it. If the interpreter is already on its way out, or joins that thread with the GIL held,
    the process aborts ("terminate called without an active exception") or hangs; so the thread gets
    its turn first.
    """
    if accelerator.num_processes > 1:
        time.sleep(LAST_WORK)
    accelerator.end_training()
