"""Limits on the time of code in this process: it may set signals, sleep, loop or swallow exceptions."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from alignkit.distributed import deadline
from alignkit.distributed.deadline import TimeIsUp, in_thread, within


def loops():
    while True:
        pass


def swallows():
    """Goes on after whatever exception, as a careless retry does."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with contextlib.suppress(Exception):
            time.sleep(20)


@pytest.mark.parametrize("code", [loops, lambda: time.sleep(20), swallows])
def test_code_that_does_not_end_is_ended(code):
    before = signal.getsignal(deadline.SIGNAL)
    began = time.monotonic()
    with pytest.raises(TimeIsUp):
        within(0.1, "code", code)
    assert time.monotonic() - began < 5
    assert signal.getsignal(deadline.SIGNAL) == before


def test_code_runs_in_the_main_thread_and_its_result_or_exception_comes_out():
    def raises():
        raise KeyError("a")

    assert within(5.0, "code", threading.current_thread) is threading.main_thread()
    with pytest.raises(KeyError):
        within(5.0, "code", raises)


def test_a_timer_of_its_own_works_under_the_limit():
    """What math_verify and others do around each answer."""

    def too_slow(number, frame):
        raise ValueError("of its own")

    def timed():
        before = signal.signal(signal.SIGALRM, too_slow)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        try:
            time.sleep(20)
        except ValueError as error:
            return str(error)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    assert within(10.0, "code", timed) == "of its own"


def test_the_limit_comes_at_any_moment_without_harm():
    """Even at the very end of the code, the signal never reaches what comes behind it."""
    for i in range(60):
        with contextlib.suppress(TimeIsUp):
            within(0.002, "code", lambda i=i: time.sleep(0.0016 + 0.00001 * i))
    time.sleep(0.01)


def test_other_threads_have_the_limit_too_and_no_loop_is_left_behind():
    caught = []

    def elsewhere():
        try:
            within(0.1, "looping code", loops)
        except TimeIsUp:
            caught.append(True)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(10)
    time.sleep(0.2)
    assert caught
    assert not [t for t in threading.enumerate() if t.name == "looping code"]


def test_a_thread_gives_back_what_its_code_returns_or_raises():
    assert in_thread(5.0, "code", lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        in_thread(5.0, "code", lambda: 1 // 0)


def test_code_that_cannot_be_ended_ends_the_process_with_exit_code_7():
    program = (
        "import time\n"
        "from alignkit.distributed import deadline\n"
        "deadline.PATIENCE = 1.0\n"
        "def stubborn():\n"
        "    while True:\n"
        "        try:\n"
        "            time.sleep(60)\n"
        "        except BaseException:\n"
        "            pass\n"
        "deadline.within(0.1, 'reward mine', stubborn)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=os.environ
    )
    assert done.returncode == 7
    assert "reward mine did not return within 0.1 s and cannot be stopped" in done.stderr
