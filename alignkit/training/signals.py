"""SIGTERM and SIGINT end a run at the next step boundary,
after a checkpoint; a second one ends it at once.
"""

import signal
from collections.abc import Callable

from alignkit.errors import AlignkitError


class Interrupted(AlignkitError):
    """A signal ended the run. The exit code is the shell's: 128 + the signal."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


class Signals:
    """Inside the context, `caught` is the signal that came, else 0. Off the main thread signals are
    left to the host.
    """

    def __init__(self) -> None:
        self.caught = 0
        self._before: dict[signal.Signals, Callable | int | None] = {}

    def __enter__(self) -> "Signals":
        try:
            self._before = {
                s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)
            }
        except ValueError:  # not the main thread: a notebook's executor
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _: object) -> None:
        if self.caught:
            raise Interrupted(signum, f"stopped by a second signal {signum} before the step's end")
        self.caught = signum
