"""Verifiers: code that judges what a model wrote, in processes that can be killed.

A verifier that hangs, eats the memory or crashes costs one completion its score, not the run.
Messages are JSON, never pickle; a process is replaced after every failure and after a number of
completions, so that nothing a completion leaves behind reaches later ones for long.
"""

import contextlib
import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from alignkit.errors import ConfigError, DataError, ResourceError
from alignkit.rewards.checks import quoted

_START = 120.0  # seconds for a process to import the verifier
_RECYCLE = 256  # completions after which a process is replaced
_LONGEST = 1 << 20  # bytes of an answer

# The environment of the processes; the tokens and keys of the run's own stay outside.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "SYSTEMROOT")
log = logging.getLogger("alignkit")


class Verifier:
    """f(prompt, completion, **columns) -> float, bool or None, for each completion on its own,
    under a wall-clock limit.
    """

    def __init__(
        self,
        spec: str,
        *,
        timeout: float = 10.0,
        failed: float = 0.0,
        workers: int = 2,
        memory_mb: int = 4096,
        drop: bool = False,
    ):
        self.name = spec.rpartition(":")[2]
        self.failed = failed
        self.drop = drop
        self.metrics: dict[str, float] = {}
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        processes = [_Process(spec, timeout, memory_mb) for _ in range(workers)]
        for process in processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")
        self._end = weakref.finalize(self, _stop_all, processes)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[Any]:
        """One value per completion; `failed` where the process had to be killed or died.

        Raises DataError for an exception in the verifier (unless `drop`), ConfigError when it
        cannot be loaded, ResourceError when it failed on every completion.
        """
        questions = [
            {
                "prompt": prompt,
                "completion": completion,
                "columns": {name: column[row] for name, column in columns.items()},
            }
            for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        answers = list(self._threads.map(self._ask, questions))

        failures = [answer["failed"] for answer in answers if "failed" in answer]
        if failures and len(failures) == len(answers):
            raise ResourceError(
                f"verifier {self.name} failed on each of the {len(answers)} completions "
                f"({failures[0]}); raise its `timeout` or `memory_mb`, or mend it"
            )

        self.metrics = {"failed": len(failures)}
        return [
            self._value(answer, question, row)
            for row, (answer, question) in enumerate(zip(answers, questions))
        ]

    def close(self) -> None:
        """End the processes."""
        self._end()
        self._threads.shutdown(wait=False)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        process = self._idle.get()
        try:
            return process.ask(question)
        finally:
            self._idle.put(process)

    def _value(self, answer: dict[str, Any], question: dict[str, Any], row: int) -> Any:
        if "failed" in answer:
            return self.failed
        if "error" not in answer:
            return answer["value"]
        if self.drop:
            return float("nan")  # set aside and counted by the caller

        log.error("verifier %s, row %d:\n%s", self.name, row, answer["traceback"])
        raise DataError(
            f"verifier {self.name} raised {answer['error']} on row {row}: "
            f"{quoted(question['prompt'], question['completion'])}"
        )


class _Process:
    """One worker process, started when first needed."""

    def __init__(self, spec: str, timeout: float, memory_mb: int):
        self.spec = spec
        self.timeout = timeout
        self.memory_mb = memory_mb
        self.child: subprocess.Popen[bytes] | None = None
        self.asked = 0
        self.unread = b""

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The worker's answer, or {"failed": why}."""
        if self.child is None or self.asked >= _RECYCLE:
            self.stop()
            self._start()
        assert self.child is not None
        assert self.child.stdin is not None

        self.asked += 1
        try:
            self.child.stdin.write(json.dumps(question, default=str).encode() + b"\n")
            self.child.stdin.flush()
            answer = self._read(self.timeout)
        except BrokenPipeError:
            answer = {"failed": "its process ended"}

        if "failed" in answer:  # whatever it still does must not reach the next completion
            self.stop()
        return answer

    def stop(self) -> None:
        """Kill the worker and everything it started."""
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGKILL)
            self.child.communicate()
        self.child = None
        self.asked = 0
        self.unread = b""

    def _start(self) -> None:
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        settings = [self.spec, str(self.timeout), str(self.memory_mb)]

        # A session of its own: `stop` then ends everything that the verifier has started, too.
        self.child = subprocess.Popen(
            [sys.executable, "-m", "alignkit.rewards.worker", *settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        first = self._read(_START)
        if "ready" not in first:
            self.stop()
            reason = first.get("broken") or first["failed"]
            raise ConfigError(f"rewards.verifier: {self.spec} cannot be loaded: {reason}")

    def _read(self, seconds: float) -> dict[str, Any]:
        """The next line of the worker as JSON, or {"failed": why}."""
        assert self.child is not None
        assert self.child.stdout is not None
        deadline = time.monotonic() + seconds
        descriptor = self.child.stdout.fileno()

        # Read piece by piece: a worker that writes half a line and hangs is over its time as well.
        while b"\n" not in self.unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                return {"failed": f"no answer within {seconds:g} s"}

            chunk = os.read(descriptor, 65536)
            if not chunk:
                return {"failed": "its process ended"}
            self.unread += chunk
            if len(self.unread) > _LONGEST:
                return {"failed": f"an answer of more than {_LONGEST} bytes"}

        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)


def _stop_all(processes: Sequence[_Process]) -> None:
    for process in processes:
        process.stop()
