"""Several runs at once: long-lived worker processes that
outlive a failed run and survive a crashed worker.
"""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
TICK = 0.5  # seconds between two looks at the workers
PATIENCE = 120.0  # seconds that a worker has for its checkpoint when it is told to stop


@dataclass
class _Worker(Generic[Item]):
    process: SpawnProcess
    pipe: Connection
    item: Item | None = None


def run_apart(
    items: Sequence[Item],
    work: Callable[[Item], None],
    processes: int,
    crashed: Callable[[Item, str], None],
    watch: Callable[[Sequence[Item]], None],
) -> None:
    """Call `work(item)` for every item, `processes` at a time, each in a worker process.

    `work` handles its own errors; where it takes its process down with it, `crashed(item, how)` is
    called here and the other items go on. `watch(items at work)` is called every half second. An
    exception in this process (a signal) asks the workers to stop, lets them write their
    checkpoints, and goes on upwards.
    """
    waiting = deque(items)
    workers: list[_Worker[Item]] = []
    try:
        while waiting or any(worker.item is not None for worker in workers):
            while waiting and (worker := _idle(workers, work, processes)):
                worker.item = waiting.popleft()
                with suppress(OSError):  # it died between two items: `recv` below finds out
                    worker.pipe.send(worker.item)

            # A pipe is ready when its worker answers, or when its worker is gone.
            busy = {worker.pipe: worker for worker in workers if worker.item is not None}
            for ready in connection.wait(list(busy), timeout=TICK):
                worker = busy[ready]  # type: ignore[index]
                try:
                    worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    workers.remove(worker)
                    crashed(worker.item, _cause_of_death(worker.process.exitcode))  # type: ignore[arg-type]
                worker.item = None
            watch([worker.item for worker in workers if worker.item is not None])
    except BaseException:
        _stop(workers)
        raise
    for worker in workers:
        worker.pipe.close()  # the worker ends when its pipe is closed
        worker.process.join(PATIENCE)


def _idle(
    workers: list[_Worker[Item]], work: Callable[[Item], None], processes: int
) -> "_Worker[Item] | None":
    """A worker without work, started if there may be one more."""
    free = next((worker for worker in workers if worker.item is None), None)
    if free is None and len(workers) < processes:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, work), daemon=False)
        process.start()
        theirs.close()
        free = _Worker(process, ours)
        workers.append(free)
    return free


def _stop(workers: Sequence[_Worker[Any]]) -> None:
    for worker in workers:
        worker.process.terminate()
    until = time.monotonic() + PATIENCE
    for worker in workers:
        worker.process.join(max(0.0, until - time.monotonic()))
        worker.process.kill()


def _cause_of_death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        guess = " (out of memory?)" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{guess}"
    return f"its process ended with exit code {code}"


def _serve(pipe: Connection, work: Callable[[Any], None]) -> None:
    """A worker's life: one item after the other, until the other end of the pipe is closed."""
    os.setsid()  # Ctrl-C in a terminal reaches the parent alone, which asks once
    threading.Thread(target=_stop_with_parent, args=(os.getppid(),), daemon=True).start()
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        work(item)
        pipe.send(None)


def _stop_with_parent(parent: int) -> None:
    """Stop this process when its parent is gone: an orphan would
    hold its run's lock against the next attempt.
    """
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
