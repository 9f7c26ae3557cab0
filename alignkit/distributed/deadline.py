"""A wall-clock limit for code that may never come back, such as a user's function.

In the main thread the code runs where it is, so that it may set signals and be interrupted; another
thread watches the clock. Elsewhere Python allows no signals, and the code gets a thread of its own.
"""

import ctypes
import logging
import os
import queue
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from alignkit.errors import ResourceError

T = TypeVar("T")
log = logging.getLogger("alignkit")

# The signal that ends the code. Timeouts that people write use SIGALRM, which stays theirs.
SIGNAL = signal.SIGVTALRM

# Seconds that code may take to end once its time is up, before the process ends without it.
PATIENCE = 30.0


class TimeIsUp(BaseException):
    """The code took longer than it may. No Exception, so that code which catches all of those does
    not catch this one.
    """


def within(seconds: float, what: str, call: Callable[[], T]) -> T:
    """The result of `call`. Raises TimeIsUp after `seconds`; `what` names it in the log.

    Code that goes on all the same (it hangs in a library that never returns to Python) cannot be
    left behind in the main thread: it ends the process with the exit code of a ResourceError.
    """
    if threading.current_thread() is threading.main_thread():
        return _watched(seconds, what, call)
    return in_thread(seconds, what, call)


def in_thread(seconds: float, what: str, call: Callable[[], T]) -> T:
    """The result of `call` in a thread of its own. Raises TimeIsUp after `seconds`; the thread ends
    with the next line of Python that it runs.
    """
    box: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            box.put((call(), None))
        except BaseException as error:
            box.put((None, error))

    thread = threading.Thread(target=work, daemon=True, name=what)
    thread.start()
    try:
        result, error = box.get(timeout=seconds)
    except queue.Empty:
        end = ctypes.pythonapi.PyThreadState_SetAsyncExc
        end(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimeIsUp))
        raise TimeIsUp from None

    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def _watched(seconds: float, what: str, call: Callable[[], T]) -> T:
    """The result of `call` in this thread, the main one, while another watches the clock."""
    # What the signal looks at. To set it is one step, which nothing interrupts.
    is_running = False
    finished = threading.Event()
    main_thread = threading.get_ident()

    def stop(number: int, frame: FrameType | None) -> None:
        if is_running:
            raise TimeIsUp

    def watch() -> None:
        if finished.wait(seconds):
            return
        for _ in range(round(PATIENCE)):
            signal.pthread_kill(main_thread, SIGNAL)
            if finished.wait(1.0):
                return
        log.error("%s did not return within %g s and cannot be stopped", what, seconds)
        os._exit(ResourceError.exit_code)

    before = signal.signal(SIGNAL, stop)
    watcher = threading.Thread(target=watch, daemon=True, name=f"time limit of {what}")
    watcher.start()
    try:
        try:
            is_running = True
            return call()
        finally:  # the signal may come between the code's last line and this one
            is_running = False
    finally:
        is_running = False
        finished.set()
        watcher.join()
        signal.signal(SIGNAL, signal.SIG_DFL if before is None else before)
