"""The process in which a verifier runs: JSON lines in, JSON lines out. Started as `python -m
alignkit.rewards.worker`.
"""

import contextlib
import io
import json
import os
import resource
import signal
import sys
import traceback
from math import ceil
from typing import Any

from alignkit.config.plugins import load_object

_BACKSTOP = 5  # seconds after the limit at which the process ends itself, should its parent be gone


def main(spec: str, timeout: float, memory_mb: int) -> None:
    """Answer {"prompt", "completion", "columns"} with {"value"} or {"error", "traceback"} until the
    input ends.
    """
    # Questions and answers go over the pipes that the process began with. The verifier gets
    # others: what it prints must not look like an answer, and it must not read the questions.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    questions = sys.stdin
    sys.stdin = io.StringIO()

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the parent has announced the code
            function: Any = load_object(spec, what="rewards.verifier")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    except Exception as error:
        _send(replies, {"broken": f"{type(error).__name__}: {error}"})
        return

    _send(replies, {"ready": True})
    for line in questions:
        question = json.loads(line)
        signal.alarm(ceil(timeout) + _BACKSTOP)
        _send(replies, _answer(function, question))
        signal.alarm(0)


def _answer(function: Any, question: dict[str, Any]) -> dict[str, Any]:
    try:
        value = function(question["prompt"], question["completion"], **question["columns"])
        if value is None or isinstance(value, bool | int | float):
            return {"value": value}
        return {"value": float(value)} if not isinstance(value, str | bytes) else {"value": value}
    except MemoryError:
        return {"failed": "out of memory"}
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def _send(replies: Any, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message, default=str) + "\n")
    replies.flush()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
