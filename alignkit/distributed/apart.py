"""How a process begins that runs code apart from the run: verifiers and environments. The run starts
it with `alignkit.distributed.worker_pool.Worker` and asks it one line at a time.
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkit.config.plugins import load_object
from alignkit.distributed.confinement import (
    adopt_orphans,
    end_all,
    hide_process,
    let_in,
    volunteer_for_out_of_memory,
)
from alignkit.distributed.worker_pool import Lines, NoLine
from alignkit.errors import AlignkitError

LONGEST_QUESTION = 1 << 34  # bytes: questions come from the run, which sets its own limits


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the run allows the code.

    timeout     seconds for one answer
    memory_mb   MiB of address space of each of its processes
    user        id of the user that it runs as, None for this process's
    own_mounts  whether this process may change what is mounted where, seen by itself alone
    taken       processes that the run's user has anyway
    """

    timeout: float
    memory_mb: int
    user: int | None
    own_mounts: bool
    taken: int


class Wires:
    """The pipes to the run that this process began with. Code gets others in their place: what it
    prints must not look like an answer.
    """

    def __init__(self) -> None:
        self.questions = Lines(os.dup(0), longest=LONGEST_QUESTION)
        self._replies = os.fdopen(os.dup(1), "w")
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(2, 1)

    @property
    def lifeline(self) -> int:
        """A descriptor that becomes readable when the run asks something, or has ended."""
        return self.questions.descriptor

    @property
    def descriptors(self) -> list[int]:
        """That no child may have."""
        return [self.lifeline, self._replies.fileno()]

    def send(self, message: dict[str, Any]) -> None:
        """Write one line to the run."""
        self._replies.write(json.dumps(message, default=str) + "\n")
        self._replies.flush()


def begin() -> Wires:
    """Called first: the pipes, and a process that answers for all that its children start."""
    wires = Wires()
    volunteer_for_out_of_memory()
    hide_process()
    adopt_orphans()
    return wires


def answer_all(
    wires: Wires, answer: Callable[[dict[str, Any]], dict[str, Any]], user: int | None
) -> None:
    """Send the answer to each question, under the question's id, until the run has ended; then end
    whatever is left of the processes that run as `user`.
    """
    with contextlib.suppress(NoLine):
        while True:
            question = json.loads(wires.questions.next(None))
            wires.send({**answer(question), "id": question["id"]})
    end_all(None, user)


def silent() -> None:
    """A child's standard streams lead nowhere from here on."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)


def load(specs: Iterable[str], *, what: str) -> list[Any]:
    """The objects at `module:name` or `file.py:name`; the run has announced their code already."""
    with contextlib.redirect_stderr(io.StringIO()):
        return [load_object(spec, what=what) for spec in specs]


def said_by(error: Exception) -> str:
    """What to tell of code that could not be loaded: alignkit's own errors say it all."""
    return str(error) if isinstance(error, AlignkitError) else f"{type(error).__name__}: {error}"


def let_in_code(specs: Sequence[str], limits: Limits) -> list[str]:
    """Let the other user, where there is one, read Python and the code; returns the folders that
    stay closed.
    """
    if limits.user is None:
        return []
    needed = {sys.prefix, sys.base_prefix, os.path.realpath(sys.executable), os.getcwd()}
    needed |= {path or os.getcwd() for path in sys.path}
    for spec in specs:
        file = spec.rpartition(":")[0]
        if file.endswith(".py"):
            needed.add(str(Path(file).resolve().parent))

    closed = let_in(needed, own_mounts=limits.own_mounts)
    os.chdir(os.getcwd())  # the folder as it is now
    return [str(path) for path in closed]
