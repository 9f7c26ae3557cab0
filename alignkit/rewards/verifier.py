"""Verifiers: code that judges what a model wrote, in processes that can be killed.

A verifier that hangs, eats the memory or crashes costs one completion its score, not the run. Each
completion is judged by a process of its own, kept apart from the run as far as this machine allows.
"""

import json
import logging
import queue
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from alignkit.distributed.confinement import hide_process, processes_of_user
from alignkit.distributed.isolation import choose
from alignkit.distributed.worker_pool import Worker
from alignkit.errors import ConfigError, DataError, ResourceError
from alignkit.rewards.checks import quoted

_GRACE = 10.0  # seconds that a worker may take beside the completion's own
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
        self.spec = spec
        self.timeout = timeout
        self.workers = [_worker(spec, timeout, memory_mb) for _ in range(workers)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self.workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")
        self._end = weakref.finalize(self, _stop_all, self.workers)
        self._warned = False

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
        worker = self._idle.get()
        try:
            answer = worker.ask(question, self.timeout + _GRACE)
        finally:
            self._idle.put(worker)
        self._warn(worker)
        if "broken" in answer:
            why = answer["broken"].removeprefix("rewards.verifier: ")
            raise ConfigError(f"rewards.verifier: {self.spec} cannot be loaded: {why}")
        return answer

    def _warn(self, worker: Worker) -> None:
        """Once: what the isolation of this machine does not keep apart, or keeps from working."""
        if self._warned:
            return
        self._warned = True

        if worker.isolation.kind == "none":
            log.warning(
                "verifier %s: this machine offers neither another user nor process namespaces "
                "(`unshare` or `bwrap`), so code of completions could stop the run or change its "
                "files; docs/reliability.md says more",
                self.name,
            )
        if closed := worker.greeting.get("closed"):
            log.warning(
                "verifier %s runs as a user of its own, who may not read %s; what it imports or "
                "reads there must be imported at the top of its file, or be opened to other users",
                self.name,
                ", ".join(closed),
            )

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


def _worker(spec: str, timeout: float, memory_mb: int) -> Worker:
    """A worker that is started when it is first asked."""
    isolation = choose()
    if isolation.kind == "none":
        hide_process()  # else its environment could be read by whatever the worker runs
    settings = {
        "spec": spec,
        "timeout": timeout,
        "memory_mb": memory_mb,
        "user": isolation.user,
        "own_mounts": isolation.own_mounts,
        "taken": processes_of_user(),
    }
    return Worker("alignkit.rewards.worker", [json.dumps(settings)], isolation)


def _stop_all(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.stop()
