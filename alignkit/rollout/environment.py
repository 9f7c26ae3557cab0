"""Worlds that a policy acts in over several turns, and the functions that it may call there.

An environment is a class in the form that TRL 1.16 takes as `environment_factory`; nothing has to
be inherited. One instance is made, reset and used again for episode after episode:

    class Shop:
        def reset(self, **row) -> str | None: ...  # text to append to the prompt, or None
        def search(self, query: str) -> str: ...  # every other public method is a tool
        def get_reward(self) -> float: ...  # optional: once, when the episode has ended

Four further methods are optional and are no tools. Worlds without tool calls have
`step(text) -> (text, reward, done)`, which is asked after every turn, and may have
`context() -> str | None`, which is asked after it: what the next turn reads behind the prompt in place
of all that was said, None for all of it. `state() -> str` says in which state the next turn is taken,
so that turns of different episodes can be compared. `seed(number)` is called before `reset`; all
episodes of one prompt get the same number.

This module runs where the user's code runs. It imports neither torch nor transformers, except to
write down the schemas of tools.
"""

import asyncio
import inspect
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

RESERVED = ("reset", "get_reward", "step", "state", "seed")
TEXT = 2000  # characters of an exception's text

Question = Mapping[str, Any]
Answer = dict[str, Any]  # {"failed": why} where the episode cannot go on


class Environment(Protocol):
    """The least that an environment has."""

    def reset(self, **row: Any) -> str | None:
        """Begin an episode of a row; text to append to its prompt, or None."""
        ...


@dataclass(frozen=True)
class About:
    """What an environment and the tools beside it offer."""

    steps: bool = False  # it answers every turn itself, by `step`
    rewards: bool = False  # it has `get_reward`
    schemas: Sequence[Mapping[str, Any]] = ()  # of its tools, as transformers writes them


def tool_methods(environment: Any) -> list[Callable[..., Any]]:
    """The methods of an environment that the policy may call. None where it has `step`.

    They are listed on the class, since looking at an instance would evaluate its properties.
    """
    if environment is None or hasattr(environment, "step"):
        return []
    functions = inspect.getmembers(type(environment), predicate=inspect.isfunction)
    names = [name for name, _ in functions if name not in RESERVED and not name.startswith("_")]
    return [getattr(environment, name) for name in names]


class Instance:
    """An environment (or None) and tools beside it, asked in plain data and answering in plain
    data: what goes over a pipe to the process in which they live.
    """

    def __init__(
        self, factory: Callable[[], Any] | None, tools: Sequence[Callable[..., Any]] = ()
    ) -> None:
        self.environment: Any = None if factory is None else factory()
        if self.environment is not None and not callable(getattr(self.environment, "reset", None)):
            raise TypeError(
                f"{type(self.environment).__name__} has no method `reset`; an environment needs one"
            )
        every_tool = [*tools, *tool_methods(self.environment)]
        self.tools = {tool.__name__: tool for tool in every_tool}

    def about(self) -> About:
        """What it offers. Raises what transformers raises on a tool without a type or a docstring."""
        schemas: list[Any] = []
        if self.tools:
            from transformers.utils import get_json_schema

            schemas = [get_json_schema(tool) for tool in self.tools.values()]
        return About(
            steps=hasattr(self.environment, "step"),
            rewards=hasattr(self.environment, "get_reward"),
            schemas=schemas,
        )

    def answer(self, question: Question) -> Answer:
        """The answer to {"do": ...}, or {"failed": why} where the environment raises or returns
        what it may not. An exception in a tool is an answer: the policy reads it.

        reset   "row", "seed"  -> "text", "state"
        step    "text"         -> "text", "reward", "done", "context", "state"
        tools   "calls"        -> "results", a list of {"content", "failed"}; "state"
        reward                 -> "reward"
        """
        try:
            answer = getattr(self, f"_{question['do']}")(question)
            if question["do"] != "reward":
                answer["state"] = self._state()
            return dict(answer)
        except Exception as error:
            return {"failed": f"{question['do']}: {type(error).__name__}: {error}"[:TEXT]}

    def _reset(self, question: Question) -> Answer:
        if self.environment is None:
            return {"text": None}
        if hasattr(self.environment, "seed"):
            _waited(self.environment.seed(question["seed"]))
        return {"text": _text(_waited(self.environment.reset(**question["row"])), "reset")}

    def _step(self, question: Question) -> Answer:
        result = _waited(self.environment.step(question["text"]))
        if not isinstance(result, tuple) or len(result) != 3:
            raise TypeError(f"step returned {_kind(result)}; it should return (text, reward, done)")
        text, reward, done = result
        words = _text(text, "step") or ""
        finished = _flag(done, "step")
        context = None if finished else self._context()
        if words and context is not None:
            raise ValueError(
                "step returned words and context() what is read in their place; give one of them"
            )
        return {
            "text": words,
            "reward": _number(reward, "step"),
            "done": finished,
            "context": context,
        }

    def _context(self) -> str | None:
        if not hasattr(self.environment, "context"):
            return None
        return _text(_waited(self.environment.context()), "context")

    def _tools(self, question: Question) -> Answer:
        return {"results": [self._called(call) for call in question["calls"]]}

    def _called(self, call: Mapping[str, Any]) -> Answer:
        name = call["name"]
        try:
            if name not in self.tools:
                raise ValueError(f"Tool {name} not found.")
            result = _waited(self.tools[name](**call["arguments"]))
        except Exception as error:
            return {"content": str({"error": str(error)[:TEXT]}), "failed": True}
        return {"content": str(result), "failed": False}

    def _reward(self, question: Question) -> Answer:
        if not hasattr(self.environment, "get_reward"):
            return {"reward": 0.0}
        return {"reward": _number(_waited(self.environment.get_reward()), "get_reward")}

    def _state(self) -> str | None:
        if not hasattr(self.environment, "state"):
            return None
        return _text(_waited(self.environment.state()), "state")


def reseed(number: int) -> None:
    """Python's own random numbers, so that an environment that draws from them repeats itself."""
    random.seed(number)


def _waited(result: Any) -> Any:
    """The result of a function that may be a coroutine."""
    if inspect.isawaitable(result):

        async def wait() -> Any:
            return await result

        return asyncio.run(wait())
    return result


def _text(value: Any, method: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise TypeError(f"{method} returned {_kind(value)}; text or None is allowed")


def _flag(value: Any, method: str) -> bool:
    """True or False, numpy's among them; "no" and None are neither."""
    if value in (True, False):
        return bool(value)
    raise TypeError(
        f"{method} says with {_kind(value)} whether it is done; True or False is allowed"
    )


def _number(value: Any, method: str) -> float:
    try:
        number = float(value)
        if isinstance(value, str | bytes):
            raise TypeError
    except (TypeError, ValueError):
        raise TypeError(f"{method} gave the reward {_kind(value)}; a number is allowed") from None
    if not math.isfinite(number):
        raise ValueError(f"{method} gave the reward {number}; a finite number is allowed")
    return number


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
