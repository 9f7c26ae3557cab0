"""Where the run finds its environments: in workers of their own, or in this process for worlds that
ship with alignkit. Either way every episode has a place, asked by its number.
"""

import json
import logging
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from alignkit.distributed.confinement import hide_process, processes_of_user
from alignkit.distributed.isolation import choose
from alignkit.distributed.worker_pool import Worker
from alignkit.errors import ConfigError
from alignkit.rollout.environment import About, Answer, Instance, Question

log = logging.getLogger("alignkit")

_GRACE = 30.0  # seconds that the host may take beside the episodes' own
_LONGEST = 1 << 28  # bytes of the answers of all places together
AT_A_TIME = 16  # places that are asked at once

Calls = Sequence[tuple[int, Question]]  # (place, question)


class Environments(Protocol):
    """Places in which episodes are played, each with an instance of its own."""

    @property
    def about(self) -> About:
        """What the environment and its tools offer."""
        ...

    def ask(self, calls: Calls) -> list[Answer]:
        """The answers of these places, as `Instance.answer` gives them; {"failed": why} where a
        place hangs, dies or answers in another form. The next `reset` finds the place mended.
        """
        ...


class LocalEnvironments:
    """Instances in this process: for code that is trusted."""

    def __init__(
        self, factory: Callable[[], Any] | None, tools: Sequence[Callable[..., Any]] = ()
    ) -> None:
        self._new = lambda: Instance(factory, tools)
        self._places: dict[int, Instance] = {}
        self.about = self._new().about()

    def ask(self, calls: Calls) -> list[Answer]:
        """See `Environments.ask`."""
        return [
            checked(question, self._places.setdefault(place, self._new()).answer(question))
            for place, question in calls
        ]


class WorkerEnvironments:
    """Instances in processes of their own, one for each place, kept apart from the run as far as
    this machine allows. They are children of one host process, which imports the code once.
    """

    def __init__(
        self,
        environment: str | None,
        tools: Sequence[str] = (),
        *,
        timeout: float = 10.0,
        memory_mb: int = 4096,
    ) -> None:
        isolation = choose()
        if isolation.kind == "none":
            hide_process()
            log.warning(
                "rollout.environment: this machine offers neither another user nor process "
                "namespaces (`unshare` or `bwrap`), so its code could stop the run or change its "
                "files; docs/reliability.md says more"
            )
        settings = {
            "environment": environment,
            "tools": list(tools),
            "timeout": timeout,
            "memory_mb": memory_mb,
            "user": isolation.user,
            "own_mounts": isolation.own_mounts,
            "taken": processes_of_user(),
        }
        self.timeout = timeout
        self._host = Worker(
            "alignkit.rollout.environment_host",
            [json.dumps(settings)],
            isolation,
            longest=_LONGEST,
        )
        weakref.finalize(self, self._host.stop)
        self.about = self._about(environment)

    def _about(self, environment: str | None) -> About:
        self._asked([])
        about = dict(self._host.greeting["about"])
        if closed := self._host.greeting.get("closed"):
            log.warning(
                "the environment runs as a user of its own, who may not read %s; what it imports "
                "or reads there must be imported at the top of its file, or be opened to others",
                ", ".join(closed),
            )
        return About(**about)

    def ask(self, calls: Calls) -> list[Answer]:
        """See `Environments.ask`."""
        answers: list[Answer] = []
        for start in range(0, len(calls), AT_A_TIME):
            part = calls[start : start + AT_A_TIME]
            answers += [
                checked(question, answer) for (_, question), answer in zip(part, self._asked(part))
            ]
        return answers

    def _asked(self, calls: Calls) -> list[Answer]:
        answer = self._host.ask({"calls": list(calls)}, self.timeout + _GRACE)
        if "broken" in answer:
            why = answer["broken"]
            named = why.startswith("rollout.")  # which field it is about
            raise ConfigError(why if named else f"rollout.environment cannot be used: {why}")
        if "answers" not in answer:
            return [{"failed": f"the host of the environments: {answer['failed']}"} for _ in calls]
        return list(answer["answers"])

    def close(self) -> None:
        """End the processes."""
        self._host.stop()


def checked(question: Question, answer: Any) -> Answer:
    """`answer` if it has the form that belongs to the question, else {"failed": why}. The code of
    an environment may write anything to the pipe.
    """
    if isinstance(answer, dict) and set(answer) == {"failed"}:
        return {"failed": str(answer["failed"])}
    forms: dict[str, dict[str, Callable[[Any], bool]]] = {
        "reset": {"text": _is_text, "state": _is_text},
        "step": {
            "text": _is_text,
            "reward": _is_number,
            "done": _is_bool,
            "context": _is_text,
            "state": _is_text,
        },
        "tools": {"results": _are_results, "state": _is_text},
        "reward": {"reward": _is_number},
    }
    form = forms[question["do"]]
    right = (
        isinstance(answer, dict)
        and set(answer) == set(form)
        and all(allowed(answer[name]) for name, allowed in form.items())
    )
    if right and question["do"] == "tools" and len(answer["results"]) != len(question["calls"]):
        right = False
    return answer if right else {"failed": f"{question['do']}: an answer of another form"}


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _are_results(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(result, dict)
        and set(result) == {"content", "failed"}
        and isinstance(result["content"], str)
        and isinstance(result["failed"], bool)
        for result in value
    )
