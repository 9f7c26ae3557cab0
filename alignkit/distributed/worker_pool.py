"""Workers that can be killed: processes of their own, asked in JSON lines, each under a deadline.

Every question carries a random id, and only a line with the same id is its answer. A worker that
answers anything else, or nothing in time, is ended and replaced.
"""

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from alignkit.distributed.isolation import Isolation

_START = 120.0  # seconds for a worker to import what it needs
_END = 5.0  # seconds for a worker to end what it has started
_LONGEST = 1 << 20  # bytes of an answer

# The environment of a worker; the tokens and keys of the run's own stay outside.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "SYSTEMROOT")


class NoLine(Exception):
    """There is no line: the other side is late, has ended or writes too much. Says which."""


class Ended(NoLine):
    """The process on the other side has ended, or closed its end."""


class Lines:
    """The lines that come out of a pipe, each waited for until a deadline.

    Nobody waits any longer once the pipe `lifeline`, if given, has something to read or has ended.
    """

    def __init__(self, descriptor: int, *, longest: int = _LONGEST, lifeline: int | None = None):
        self.descriptor = descriptor
        self.longest = longest
        self.lifeline = lifeline
        self.unread = b""

    def next(self, seconds: float | None) -> bytes:
        """The next line, without its end. Raises NoLine. None waits for as long as it takes."""
        deadline = None if seconds is None else time.monotonic() + seconds

        # Piece by piece: whoever writes half a line and hangs is over its time as well.
        while b"\n" not in self.unread:
            ready = wait_for(self.descriptor, self.lifeline, until=deadline)
            if not ready:
                raise NoLine(f"no answer within {seconds or 0:g} s")
            if self.lifeline in ready:
                raise NoLine("nobody waits for it")
            self._read()
        return self._first()

    def available(self) -> bytes | None:
        """The next line once there is something to read; None where it has no end yet. Raises
        NoLine.
        """
        if b"\n" not in self.unread:
            self._read()
        return self._first() if b"\n" in self.unread else None

    def _read(self) -> None:
        chunk = os.read(self.descriptor, 65536)
        if not chunk:
            raise Ended("its process ended")
        self.unread += chunk
        if len(self.unread) > self.longest:
            raise NoLine(f"an answer of more than {self.longest} bytes")

    def _first(self) -> bytes:
        line, _, self.unread = self.unread.partition(b"\n")
        return line


def wait_for(
    *descriptors: int | None, until: float | None, events: int = select.POLLIN
) -> list[int]:
    """Those of `descriptors` that are ready, or have ended, before the time `until` of
    time.monotonic() (None: no limit); empty when that has come.
    """
    poll = select.poll()
    for descriptor in descriptors:
        if descriptor is not None:
            poll.register(descriptor, events)
    milliseconds = None if until is None else max(0.0, until - time.monotonic()) * 1000
    return [descriptor for descriptor, _ in poll.poll(milliseconds)]


def write_line(descriptor: int, message: bytes, until: float | None) -> None:
    """Hand over `message` and the end of its line, which may be longer than the pipe holds, before
    the time `until` of time.monotonic(). Raises NoLine.
    """
    rest = message + b"\n"
    while rest:
        if not wait_for(descriptor, until=until, events=select.POLLOUT):
            raise NoLine("its question was not read in time")
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            continue
        except BrokenPipeError:
            raise Ended("its process ended") from None


class Worker:
    """One process that runs `python -m MODULE SETTING...`, started when it is first needed.

    It first writes {"ready": true}, or {"broken": why}, and then one line for each that it reads.
    """

    def __init__(
        self,
        module: str,
        settings: Sequence[str],
        isolation: Isolation,
        *,
        longest: int = _LONGEST,
    ):
        self.longest = longest  # bytes of one answer
        self.module = module
        self.settings = settings
        self.isolation = isolation
        self.child: subprocess.Popen[bytes] | None = None
        self.greeting: dict[str, Any] = {}
        self.lines: Lines | None = None

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The worker's answer, or {"failed": why}; {"broken": why} if it does not start."""
        if self.child is None:
            broken = self._start()
            if broken is not None:
                self.stop()
                return {"broken": broken}

        identity = secrets.token_hex(16)
        message = json.dumps({"id": identity, **question}, default=str).encode()
        deadline = time.monotonic() + seconds
        try:
            assert self.child is not None
            assert self.child.stdin is not None
            write_line(self.child.stdin.fileno(), message, deadline)
            answer = self._read(deadline - time.monotonic())
            if answer.pop("id", None) != identity:
                raise NoLine("an answer to another question")
        except NoLine as error:
            self.stop()  # whatever it still writes must not become another question's answer
            return {"failed": str(error)}
        return answer

    def stop(self) -> None:
        """End the worker and everything it has started."""
        child = self.child
        if child is None:
            return
        self.child = None
        self.lines = None
        assert child.stdin is not None
        assert child.stdout is not None

        # A worker whose questions end takes what it has started with it; one that hangs is killed.
        child.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_END)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()

    def _start(self) -> str | None:
        """Start the process. Returns why it cannot work, or None."""
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        command = [*self.isolation.prefix, sys.executable, "-m", self.module, *self.settings]

        # A session of its own: signals from the terminal are for the run alone.
        self.child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            bufsize=0,
        )
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        os.set_blocking(self.child.stdin.fileno(), False)
        self.lines = Lines(self.child.stdout.fileno(), longest=self.longest)
        try:
            self.greeting = self._read(_START)
        except NoLine as error:
            return str(error)
        if "ready" in self.greeting:
            return None
        return str(self.greeting.get("broken", "its first line is no greeting"))

    def _read(self, seconds: float) -> dict[str, Any]:
        """The next line as a JSON object. Raises NoLine."""
        assert self.lines is not None
        try:
            answer = json.loads(self.lines.next(seconds))
        except (ValueError, RecursionError):
            raise NoLine("an answer that is not JSON") from None
        if not isinstance(answer, dict):
            raise NoLine("an answer that is no JSON object")
        return answer
