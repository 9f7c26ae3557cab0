"""The process that has an environment imported and starts one child per place. It is started by
alignkit.distributed.worker_pool as `python -m alignkit.rollout.environment_host SETTINGS`.

No code of an episode runs in this process. A child that hangs, dies or writes anything but one
answer ends with everything that it has started; the others go on.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alignkit.distributed import apart
from alignkit.distributed.confinement import confine, end_all, end_child, parents_of_all
from alignkit.distributed.worker_pool import Lines, NoLine, wait_for, write_line
from alignkit.errors import ConfigError
from alignkit.rollout.environment import Answer, Instance, Question, reseed

_LONGEST_ANSWER = 1 << 17  # bytes of one place: the text of a turn
_DESCRIBING = 120.0  # seconds for the schemas of the tools, which transformers writes


@dataclass(frozen=True)
class Settings(apart.Limits):
    """What the run asks for."""

    environment: str | None  # `module:name` or `file.py:name` of a class
    tools: Sequence[str]  # the same of functions


@dataclass(frozen=True)
class Child:
    """The process of one place."""

    process: int
    questions: int  # where it reads
    answers: Lines


class RunEnded(NoLine):
    """The run that asks has ended."""


def main(settings: Settings) -> None:
    """Answer {"id", "calls"} by {"id", "answers"} until the input ends."""
    wires = apart.begin()
    host = Host(settings, wires)
    try:
        host.load()
        closed = apart.let_in_code([settings.environment or "", *settings.tools], settings)
        about = host.about()
    except Exception as error:
        wires.send({"broken": apart.said_by(error)})
        end_all(None, settings.user)
        return
    wires.send({"ready": True, "closed": closed, "about": about})

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        calls = [(int(place), asked) for place, asked in question["calls"]]
        return {"answers": host.ask(calls)}

    apart.answer_all(wires, answer, settings.user)


class Host:
    """The children by place, each started when it is first asked."""

    def __init__(self, settings: Settings, wires: apart.Wires) -> None:
        self.settings = settings
        self.wires = wires
        self.children: dict[int, Child] = {}
        self.factory: Callable[[], Any] | None = None
        self.tools: list[Callable[..., Any]] = []

    def load(self) -> None:
        """Import the environment and the tools."""
        if self.settings.environment is not None:
            (self.factory,) = apart.load([self.settings.environment], what="rollout.environment")
        self.tools = apart.load(self.settings.tools, what="rollout.tools")

    def about(self) -> dict[str, Any]:
        """What the environment offers, by a child that ends afterwards: transformers stays out of
        this process and of the places.
        """
        answer = self._asked({-1: {"do": "about"}}, _DESCRIBING)[-1]
        self._end(-1)
        if "failed" in answer:
            raise ConfigError(answer["failed"].removeprefix("about: "))
        return answer

    def ask(self, calls: Sequence[tuple[int, Question]]) -> list[Answer]:
        """One answer per call; the places work at the same time, under one deadline."""
        resets = {place for place, question in calls if question["do"] == "reset"}
        self._end_leftovers(resets)
        answers = self._asked(dict(calls), self.settings.timeout)
        return [answers[place] for place, _ in calls]

    def _asked(self, calls: Mapping[int, Question], timeout: float) -> dict[int, Answer]:
        until = time.monotonic() + timeout
        answers: dict[int, Answer] = {}
        waiting: dict[int, int] = {}  # descriptor -> place
        for place, question in calls.items():
            if place not in self.children:
                self.children[place] = self._started()
            child = self.children[place]
            try:
                write_line(child.questions, json.dumps(question, default=str).encode(), until)
                waiting[child.answers.descriptor] = place
            except NoLine as error:
                answers[place] = {"failed": str(error)}

        # Whoever is ready first is read first, so that nobody waits for one that hangs.
        while waiting:
            ready = wait_for(*waiting, self.wires.lifeline, until=until)
            if self.wires.lifeline in ready:
                raise RunEnded
            for descriptor in ready or list(waiting):
                place = waiting[descriptor]
                answer = self._read(place) if ready else _late(timeout)
                if answer is not None:
                    answers[place] = answer
                    del waiting[descriptor]

        for place, answer in answers.items():
            if "failed" in answer:
                self._end(place)
        return answers

    def _read(self, place: int) -> Answer | None:
        """The place's answer, or None where it has not written all of it."""
        lines = self.children[place].answers
        try:
            line = lines.available()
        except NoLine as error:
            return {"failed": str(error)}
        if line is None:
            return None
        if lines.unread:
            return {"failed": "more than one line where its answer belongs"}
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            return {"failed": "a line that is not JSON where its answer belongs"}
        return answer if isinstance(answer, dict) else {"failed": "an answer that is no object"}

    def _started(self) -> Child:
        to_child, questions = os.pipe()
        answers, to_host = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                others = [
                    descriptor
                    for child in self.children.values()
                    for descriptor in (child.questions, child.answers.descriptor)
                ]
                for descriptor in (*self.wires.descriptors, *others, questions, answers):
                    os.close(descriptor)
                _be_the_child(self, to_child, to_host)
            finally:
                os._exit(1)  # never back into the loop of its parent

        os.close(to_child)
        os.close(to_host)
        os.set_blocking(questions, False)
        return Child(process, questions, Lines(answers, longest=_LONGEST_ANSWER))

    def _end_leftovers(self, places: set[int]) -> None:
        """End the places whose last episode has left processes, or words, behind."""
        used = places & set(self.children)
        parents = parents_of_all() if used else set()
        for place in sorted(used):
            child = self.children[place]
            if child.process in parents or wait_for(child.answers.descriptor, until=0.0):
                self._end(place)

    def _end(self, place: int) -> None:
        """End a place's process and everything that belongs to no other place."""
        child = self.children.pop(place, None)
        if child is None:
            return
        end_child(child.process, [other.process for other in self.children.values()])
        os.close(child.questions)
        os.close(child.answers.descriptor)


def _late(timeout: float) -> Answer:
    return {"failed": f"no answer within {timeout:g} s"}


def _be_the_child(host: Host, questions: int, answers: int) -> None:
    """Play episodes: answer the questions, one line each, until there are no more."""
    apart.silent()
    settings = host.settings
    lines = Lines(questions, longest=apart.LONGEST_QUESTION)
    instance: Instance | None = None

    while True:
        try:
            question = json.loads(lines.next(None))
        except NoLine:
            os._exit(0)
        try:
            if instance is None:
                about = question["do"] == "about"
                confine(settings.user, settings.memory_mb << (4 * about), settings.taken)
                instance = Instance(host.factory, host.tools)
            answer = _answer(instance, question)
        except MemoryError:
            answer = {"failed": "out of memory"}
        except BaseException as error:  # code of the episode may call exit()
            answer = {"failed": f"{question['do']}: {type(error).__name__}: {error}"}
        write_line(answers, json.dumps(answer).encode(), None)


def _answer(instance: Instance, question: Question) -> Answer:
    if question["do"] == "about":
        return asdict(instance.about())
    if question["do"] == "reset":
        reseed(question["seed"])
    return instance.answer(question)


if __name__ == "__main__":
    main(Settings(**json.loads(sys.argv[1])))
