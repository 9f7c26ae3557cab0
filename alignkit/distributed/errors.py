"""An error on one process is raised on all of them, at the same place in the program.

Processes that train together wait for each other at every collective operation. If one of them
stopped alone, the others would wait for it until a timeout. `raise_on_all_ranks` goes around work
that a process does by itself (loading, rewards, saving) and makes all of them stop with the same
message.
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
def raise_on_all_ranks(accelerator: Accelerator) -> Iterator[None]:
    """Run the block on every process; an exception on one is raised on all of them at its end.

    The process that failed raises its own exception; the others raise the same kind of error, with
    that process's rank and message. If several failed, the lowest rank's error is reported. Inside
    the block processes must not wait for each other.

    Raises ResourceError, naming the process, when one does not reach the end of the block in time.
    """
    if accelerator.num_processes == 1:
        yield
        return

    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    _wait_for_all(accelerator, failure)

    # One number tells whether anyone failed; messages are exchanged only then.
    failures = accelerator.reduce(torch.tensor(int(bool(failure)), device=accelerator.device))
    if not failures:
        return
    own_report = []
    if failure is not None:
        message = str(failure) or type(failure).__name__
        own_report = [(accelerator.process_index, _shared_kind(failure), message)]
    rank, kind, message = gather_object(own_report)[0]

    if failure is not None and rank == accelerator.process_index:
        raise failure
    raise kind(f"on rank {rank}: {message}") from failure


def _wait_for_all(accelerator: Accelerator, failure: Exception | None) -> None:
    """Wait until every process has come this far, for at most accelerate's timeout.

    Only gloo needs this: it can name the process that is missing. nccl's own watchdog does so.
    """
    if dist.get_backend() != "gloo":
        return
    handler = accelerator.init_handler
    timeout = handler.timeout if handler else None
    try:
        dist.monitored_barrier(timeout=timeout, wait_all_ranks=True)
    except RuntimeError as error:
        late = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
        who = f"rank {late[1].strip(' ,')} is" if late else "another rank (rank 0 says which) is"
        raise failure or errors.ResourceError(
            f"{who} slow, stuck or gone: the others waited for train.process_timeout. Look at what "
            "only it does (its rewards, its judge, its disk, its memory), or raise the timeout"
        ) from error


def _shared_kind(error: Exception) -> type[Exception]:
    """The class that every process can raise in place of `error`.

    That is its nearest base class in alignkit.errors, or torch's out-of-memory error. A user's own
    exception class may not exist, or may not take one message, on the other processes.
    """
    own_classes = [value for value in vars(errors).values() if isinstance(value, type)]
    shared = (torch.OutOfMemoryError, *own_classes)
    for base in type(error).__mro__:
        if base in shared:
            return base
    return errors.AlignkitError
