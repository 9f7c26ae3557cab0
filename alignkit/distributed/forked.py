"""Work in forked processes, which share what the memory holds at that moment: nothing is loaded or
handed over a second time. On Linux alone, as forks of other systems lose what libraries hold.
"""

import ctypes
import gc
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import current_process, get_context
from typing import Any, Literal, TypeVar

from alignkit.errors import ResourceError

T = TypeVar("T")
R = TypeVar("R")

MOST = 8  # processes that `auto` starts: one hands them their work
AHEAD = 2  # pieces of work for each process that wait for it, or for their turn

_PDEATHSIG = 1  # of Linux's prctl(2): the signal that a process gets when its parent dies


def number_of_workers(given: int | Literal["auto"]) -> int:
    """How many processes work; 1 where there can be no others. `auto`: one for each core."""
    if sys.platform != "linux" or current_process().daemon:  # which may not have children
        return 1
    return min(len(os.sched_getaffinity(0)), MOST) if given == "auto" else given


@contextmanager
def passed_over() -> Iterator[None]:
    """Inside the block the garbage collector passes over what stands now: with transformers and
    torch that is hundreds of thousands of objects, at which it would look again and again.
    """
    if gc.get_freeze_count():  # somebody else's, who would not expect it to end here
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def in_order(call: Callable[[T], R], pieces: Iterable[T], workers: int) -> Iterator[R]:
    """`call` of each piece, in the order of the pieces; with more than one worker it happens in
    processes of their own, where `call` may be any function, but what it returns is pickled.

    Raises what `call` raises, and ResourceError where a process ends without an answer.
    """
    if workers == 1:
        yield from map(call, pieces)
        return

    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=_begin, initargs=(call,))
    waiting: deque[Future[R]] = deque()
    try:
        for piece in pieces:
            waiting.append(pool.submit(_answer, piece))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ResourceError(
            "a process that read rows was ended, perhaps for want of memory; "
            "data.workers=1 needs the least"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_call: Callable[[Any], Any]  # what a forked process does


def _begin(call: Callable[[Any], Any]) -> None:
    """Make a forked process ready: it works on one core, and ends when its parent does."""
    import torch

    global _call
    _call = call
    gc.freeze()  # what is not looked at stays in the memory that is shared
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.setsid()  # a signal to the whole group reaches the parent alone, which ends it in order
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # the threads of the parent were not forked


def _answer(piece: Any) -> Any:
    return _call(piece)
