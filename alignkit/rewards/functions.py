"""Reward functions that run in this process: the user's own, length and format."""

import asyncio
import inspect
import logging
import re
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from alignkit.errors import AlignkitError, DataError
from alignkit.rewards.checks import quoted, refusal_of_signals, within

Values = Sequence[float | None]
CONTEXT = ("trainer_state", "log_metric", "log_extra")  # what TRL hands over beside the columns
log = logging.getLogger("alignkit")


class FunctionReward:
    """A user's function f(prompts, completions, **columns) -> list, sync or async.

    It runs in the thread that calls it, mostly the main one, so that it may set signals, as
    libraries with timeouts of their own do. `timeout` is in seconds.

    It is given what it names, or everything when it takes **kwargs: prompts, completions, the
    columns, and TRL's `trainer_state` (of which there is `global_step`), `log_metric` (into
    `metrics`) and `log_extra` (nowhere). A caller may bring its own three.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        timeout: float | None = None,
        drop: bool = False,
    ):
        self.name = name
        self.function = function
        self.timeout = timeout
        self.drop = drop
        self.metrics: dict[str, float] = {}
        parameters = inspect.signature(function).parameters.values()
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.named = {p.name for p in parameters}

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Any:
        """Its raw answer. A function that raises is tried row by row: the rows that raise are
        named, or set aside (`drop`).
        """
        self.metrics = {}
        what = f"reward {self.name}"
        try:
            return within(self.timeout, what, lambda: self._call(prompts, completions, columns))
        except AlignkitError:
            raise
        except Exception as error:
            if refusal := refusal_of_signals(what, error):
                raise refusal from error
            of_batch = error  # Python unbinds `error` at the end of the clause

        return within(
            self.timeout, what, lambda: self._row_by_row(prompts, completions, columns, of_batch)
        )

    def _call(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]
    ) -> Any:
        own = {
            "trainer_state": None,
            "log_metric": self._log_metric,
            "log_extra": lambda column, values: None,
        }
        arguments = {**own, **columns, "prompts": prompts, "completions": completions}
        if not self.takes_all:
            arguments = {name: value for name, value in arguments.items() if name in self.named}

        result = self.function(**arguments)
        return _finished(result) if inspect.isawaitable(result) else result

    def _row_by_row(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: dict[str, Any],
        of_batch: Exception,
    ) -> Any:
        """Values from one call per row, after the call with all rows raised `of_batch`."""
        values: list[Any] = []
        failed = 0
        for row in range(len(completions)):
            one = {
                name: value if name in CONTEXT else [value[row]] for name, value in columns.items()
            }
            try:
                values += self._call([prompts[row]], [completions[row]], one)
            except AlignkitError:  # of our own: a second signal that ends the run, for one
                raise
            except Exception as again:
                failed += 1
                if not self.drop:
                    # The log shows where in the user's code it happened.
                    log.error("reward %s raised on row %d:", self.name, row, exc_info=again)
                    raise DataError(
                        f"reward {self.name} raised {type(again).__name__}: {again}; first on row "
                        f"{row} of {len(completions)}: {quoted(prompts[row], completions[row])}"
                    ) from again
                values.append(float("nan"))  # set aside and counted by the caller

        # No row can be blamed: the function fails on all of them, or only on the whole batch.
        if not failed or failed == len(completions):
            log.error("reward %s raised:", self.name, exc_info=of_batch)
            on = (
                f"each of the {failed} completions"
                if failed
                else f"the batch of {len(completions)}, on no single row"
            )
            raise DataError(
                f"reward {self.name} raised {type(of_batch).__name__}: {of_batch}; on {on}"
            ) from of_batch
        return values

    def _log_metric(self, name: str, value: float) -> None:
        self.metrics[name] = float(value)


class LengthPenalty:
    """A penalty on long completions, as `LengthReward` describes it; needs `completion_ids`."""

    def __init__(self, max_tokens: int, buffer: int):
        self.max_tokens = max_tokens
        self.buffer = buffer

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        completion_ids: Sequence[Any],
        **_: Any,
    ) -> Values:
        """0 up to max_tokens - buffer tokens, -1 from max_tokens on, linear between."""
        excess = [
            (len(ids) - (self.max_tokens - self.buffer)) / self.buffer for ids in completion_ids
        ]
        return [-min(max(share, 0.0), 1.0) for share in excess]


class FormatMatch:
    """1 where the regular expression matches the whole completion,
    else 0; `.` matches newlines too.
    """

    def __init__(self, pattern: str):
        self.pattern = re.compile(pattern, re.DOTALL)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> Values:
        """One number per completion; of a chat the content of the last message is matched."""
        return [
            float(self.pattern.fullmatch(plain_text(completion)) is not None)
            for completion in completions
        ]


def plain_text(completion: Any) -> str:
    """A completion as text: a chat's last message, or the text itself."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _finished(awaitable: Any) -> Any:
    """The result of an async function. Where this thread runs an event loop already, as in a
    notebook, another thread waits for it.
    """

    async def awaited() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(awaited())
    return _beside_this_loop(awaited())


def _beside_this_loop(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine in an event loop of its own, in a thread that nobody waits for once
    the time of this one is up, or the user interrupts it.
    """
    outcome: Future[Any] = Future()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def watched() -> Any:
        task = asyncio.ensure_future(coroutine)
        running.append((asyncio.get_running_loop(), task))
        return await task

    def work() -> None:
        try:
            outcome.set_result(asyncio.run(watched()))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=work, daemon=True, name="async reward").start()
    try:
        return outcome.result()
    except BaseException:
        for loop, task in running:
            with suppress(RuntimeError):  # the loop has ended by itself
                loop.call_soon_threadsafe(task.cancel)
        raise
