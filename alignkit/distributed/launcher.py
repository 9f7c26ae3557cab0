"""Starting `alignkit --processes N`, and leaving the process group at the end.

The same command line runs once per process, supervised by torch's elastic agent: if one process
fails, it stops the others.
"""

import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import uuid4

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("alignkit")

# Seconds that gloo's threads get to finish; one that waits for the GIL has it within 5 ms.
LAST_WORK = 0.2


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `alignkit ARGUMENTS` in `processes` processes of this machine.

    Returns the exit code: 0, or that of the process that failed first (128 + n for signal n).
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
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
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
