"""Several sampling servers as one: each piece of work goes to the least loaded one, and that of a
server which died goes to the others.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from alignkit.errors import ResourceError
from alignkit.rollout.client import Client, Unreachable

AT_ONCE = 64  # requests under way at one server; it batches them itself
T = TypeVar("T")
R = TypeVar("R")
log = logging.getLogger("alignkit")


class Stale(ResourceError):
    """A server has other weights than the run gave it."""


class Fleet:
    """vLLM servers that hold the same weights."""

    def __init__(self, urls: Sequence[str], *, timeout: float):
        self.clients = [Client(url, timeout=timeout) for url in urls]
        self._under_way = [0] * len(urls)
        self._lost: dict[int, ResourceError] = {}  # servers that do not count any more, and why
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The addresses, for messages."""
        return ", ".join(client.url for client in self.clients)

    def wait(self, patience: float) -> list[dict[str, Any]]:
        """What each server says about its model, once all of them have loaded it."""
        with ThreadPoolExecutor(len(self.clients)) as pool:
            return list(pool.map(lambda client: client.wait(patience), self.clients))

    def version(self) -> str:
        """The version that the first server that answers holds."""
        return self.any(Client.version)

    def on_all(self, act: Callable[[Client], None]) -> None:
        """Do something with every server, also those that were lost before: one that was started
        again counts from here on. Unreachable where none answers.
        """
        with self._lock:
            self._lost.clear()
        self.on_alive(act)

    def on_alive(self, act: Callable[[Client], None]) -> None:
        """Do something with every server that counts. Unreachable where none is left."""

        def attempt(index: int) -> None:
            try:
                act(self.clients[index])
            except Unreachable as error:
                self._lose(index, error)

        alive = [index for index in range(len(self.clients)) if index not in self._lost]
        with ThreadPoolExecutor(len(self.clients)) as pool:
            list(pool.map(attempt, alive))
        if len(self._lost) == len(self.clients):
            raise next(iter(self._lost.values()))

    def any(self, ask: Callable[[Client], R]) -> R:
        """The answer of the least loaded server; of another where that one is gone or stale."""
        while True:
            index = self._take()
            try:
                return ask(self.clients[index])
            except (Unreachable, Stale) as error:
                self._lose(index, error)
            finally:
                with self._lock:
                    self._under_way[index] -= 1

    def map(self, ask: Callable[[Client, T], R], work: Sequence[T]) -> list[R]:
        """The answer to each piece of work, in its order. The first error ends all of it."""
        threads = min(len(work), AT_ONCE * len(self.clients))
        pool = ThreadPoolExecutor(max(1, threads))
        try:
            futures = [pool.submit(self.any, lambda c, p=piece: ask(c, p)) for piece in work]
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)

    def _take(self) -> int:
        """The server with the fewest requests under way; one is added to it."""
        with self._lock:
            alive = [i for i in range(len(self.clients)) if i not in self._lost]
            if not alive:
                raise next(reversed(self._lost.values()))
            index = min(alive, key=self._under_way.__getitem__)
            self._under_way[index] += 1
            return index

    def _lose(self, index: int, error: ResourceError) -> None:
        with self._lock:
            is_news = index not in self._lost
            self._lost[index] = error
            left = len(self.clients) - len(self._lost)
        if is_news and left:
            log.warning("%s; %d other servers take over its work", error, left)
