"""What goes wrong on one process ends all of them in the same place, so that none waits for one
that is gone.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object

from alignkit import errors


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Around what each process does by itself: an exception in the block on one is raised after it
    on all.

    The process that failed raises its own; the others raise the same kind of error, with that
    process's rank and message. If several failed, the first rank's counts. Inside the block
    processes must not wait for each other. A process that does not come out of it in time is named
    in a ResourceError.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if accelerator.num_processes == 1:
            raise
        failure = error
    if accelerator.num_processes == 1:
        return
    _meet(accelerator, failure)
    if not accelerator.reduce(torch.tensor(int(bool(failure)), device=accelerator.device)):
        return
    told = (
        [(accelerator.process_index, _kind(failure), str(failure) or type(failure).__name__)]
        if failure
        else []
    )
    rank, kind, message = gather_object(told)[0]
    if failure and rank == accelerator.process_index:
        raise failure
    raise kind(f"on rank {rank}: {message}") from failure


def _meet(accelerator: Accelerator, failure: Exception | None) -> None:
    """Wait for every process, as long as accelerate was told to. gloo can say who is missing;
    nccl's watchdog does so itself.
    """
    if dist.get_backend() != "gloo":
        return
    try:
        dist.monitored_barrier(
            timeout=accelerator.init_handler and accelerator.init_handler.timeout,
            wait_all_ranks=True,
        )
    except RuntimeError as error:
        late = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
        who = f"rank {late[1].strip(' ,')} is" if late else "another rank (rank 0 says which) is"
        raise failure or errors.ResourceError(
            f"{who} slow, stuck or gone: the others waited for train.process_timeout. Look at what only it does "
            "(its rewards, its judge, its disk, its memory), or raise the timeout"
        ) from error


def _kind(error: Exception) -> type[Exception]:
    """What every process can raise in place of `error`: the nearest class of alignkit.errors, or
    out of memory.
    """
    shared = (torch.OutOfMemoryError, *(c for c in vars(errors).values() if isinstance(c, type)))
    return next((c for c in type(error).__mro__ if c in shared), errors.AlignkitError)
