"""The process that has a verifier imported and starts one child per completion. It is started by
alignkit.distributed.worker_pool as `python -m alignkit.rewards.worker SETTINGS`.

No code of a completion runs in this process: each completion has a child of its own, which sends
its answer through a pipe of its own and is killed with everything that it has started.
"""

import contextlib
import json
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any

from alignkit.distributed import apart
from alignkit.distributed.confinement import confine, end_all
from alignkit.distributed.worker_pool import Ended, Lines, NoLine

_LONGEST_ANSWER = 1 << 17  # bytes: a number, or an exception with its traceback
_MESSAGE = 2000  # characters of an exception's text
_TRACEBACK = 20_000  # characters of its traceback


@dataclass(frozen=True)
class Settings(apart.Limits):
    """What the run asks for; an answer is that to one completion."""

    spec: str  # `module:name` or `file.py:name` of the verifier


def main(settings: Settings) -> None:
    """Answer {"id", "prompt", "completion", "columns"} by {"id"} and {"value"}, {"error",
    "traceback"} or {"failed"}, until the input ends.
    """
    wires = apart.begin()
    try:
        (function,) = apart.load([settings.spec], what="rewards.verifier")
    except Exception as error:
        wires.send({"broken": apart.said_by(error)})
        return
    wires.send({"ready": True, "closed": apart.let_in_code([settings.spec], settings)})

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        return _verified(function, question, settings, wires)

    apart.answer_all(wires, answer, settings.user)


def _verified(
    function: Any, question: dict[str, Any], settings: Settings, wires: apart.Wires
) -> dict[str, Any]:
    """The answer of a child, which ends with everything that it has started."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for descriptor in (reading, *wires.descriptors):
                os.close(descriptor)
            _be_the_child(function, question, settings, writing)
        finally:
            os._exit(1)  # never back into the loop of its parent

    # The run sends one question at a time: one that comes before this one is answered means that
    # the run has ended.
    os.close(writing)
    lines = Lines(reading, longest=_LONGEST_ANSWER, lifeline=wires.lifeline)
    line = b""
    failure: NoLine | None = None
    try:
        line = lines.next(settings.timeout)
    except NoLine as error:
        failure = error

    # After this nobody is left who could still write.
    status = end_all(child, settings.user)
    more = _has_more(lines)
    os.close(reading)

    if failure is not None:
        return {"failed": f"{failure}{_how(status) if isinstance(failure, Ended) else ''}"}
    if more:
        return {"failed": "more than one line where its answer belongs"}
    return _checked(line, question["id"])


def _be_the_child(function: Any, question: dict[str, Any], settings: Settings, pipe: int) -> None:
    """Run the verifier on one completion and write its answer to `pipe`."""
    apart.silent()
    try:
        confine(settings.user, settings.memory_mb, settings.taken)
    except (OSError, ValueError) as error:
        answer = {"failed": f"it could not be confined: {error}"}
    else:
        answer = _answer(function, question)

    message = json.dumps({**answer, "id": question["id"]}).encode() + b"\n"
    while message:
        message = message[os.write(pipe, message) :]
    os._exit(0)


def _answer(function: Any, question: dict[str, Any]) -> dict[str, Any]:
    try:
        value = function(question["prompt"], question["completion"], **question["columns"])
        if value is None or isinstance(value, bool | int | float):
            return {"value": value}
        return {"value": str(value) if isinstance(value, str | bytes) else float(value)}
    except MemoryError:
        return {"failed": "out of memory"}
    except Exception as error:
        return {
            "error": f"{type(error).__name__}: {error}"[:_MESSAGE],
            "traceback": traceback.format_exc()[-_TRACEBACK:],
        }
    except BaseException as error:  # SystemExit, most likely: code of the completion called exit()
        return {"failed": f"it raised {type(error).__name__}"}


def _checked(line: bytes, identity: str) -> dict[str, Any]:
    """`line` as the answer to the question `identity`, or {"failed": why}."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return {"failed": "a line that is not JSON where its answer belongs"}

    of_question = isinstance(answer, dict) and answer.pop("id", None) == identity
    if not of_question or set(answer) not in ({"value"}, {"failed"}, {"error", "traceback"}):
        return {"failed": "a line that is no answer to its question"}
    if "value" not in answer:
        return {name: str(text) for name, text in answer.items()}
    if not isinstance(answer["value"], bool | int | float | str | None):
        return {"failed": "an answer whose value is no number"}
    return answer


def _has_more(lines: Lines) -> bool:
    """Whether something follows the line that was read."""
    os.set_blocking(lines.descriptor, False)
    with contextlib.suppress(BlockingIOError):
        return bool(lines.unread or os.read(lines.descriptor, 1))
    return False


def _how(status: int) -> str:
    return f" by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else ""


if __name__ == "__main__":
    main(Settings(**json.loads(sys.argv[1])))
