"""Weights to servers that have GPUs of their own: NCCL broadcasts from this process to the workers of
each server, by torch.

The group is made as vLLM documents it for trainers without vLLM: this process makes an ncclUniqueId,
gives it to the server over HTTP, and both sides begin with an all-reduce of one element.
"""

import base64
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alignkit.errors import AlignkitError, ConfigError, ModelError, ResourceError, first_line
from alignkit.policies.weight_stream import WeightStream
from alignkit.rollout.client import RESUME, Client, Unreachable
from alignkit.rollout.transfer import Chunk, described

LOOK_EVERY = 0.001  # seconds between two looks at a broadcast
GRACE = 10.0  # seconds in which a server may answer that a transfer failed


class NCCL:
    """Sends tensors to each server through a group of its own, so that one that dies takes no other
    with it. See `Way`.

    timeout  seconds that anything may take
    """

    everywhere = False

    def __init__(self, device: torch.device, timeout: float):
        if not nccl_is_there():
            raise ConfigError(
                "rollout.transfer: the installed torch has no NCCL; install one that has, or set "
                "rollout.transfer=file"
            )
        self.device = device
        self.timeout = timeout
        self._groups: dict[str, Group] = {}  # by the server's address

    def begin(self, stream: WeightStream) -> None:
        """Nothing to do."""

    def join(self, client: Client) -> None:
        """Make a group with a server's workers. ResourceError."""
        self._drop(client)
        group = Group(1 + client.workers(), self.device, self.timeout)
        joined = in_background(group.join)

        try:
            name = base64.b64encode(group.unique_id(joined)).decode()
            place = {"rank_offset": 1, "world_size": group.size, "nccl_unique_id_b64": name}
            client.join({**place, "packed": False})
            joined.result(self.timeout)
        except (Unreachable, ModelError):
            group.abort()
            raise
        except Exception as error:
            group.abort()
            raise ResourceError(
                f"rollout.transfer: no NCCL group with the server at {client.url} could be made "
                f"({first_line(error)}); its GPUs have to be others than the trainer's, and NCCL's "
                "release the same. Else set rollout.transfer=file"
            ) from error
        self._groups[client.url] = group

    def pack(self, chunk: Chunk) -> Mapping[str, Any]:
        """Names, dtypes and shapes, by which the workers make room."""
        return described(chunk)

    def send(self, client: Client, info: Mapping[str, Any], chunk: Chunk) -> None:
        """Announce the tensors and broadcast them; a group in which that failed is not used again."""
        asked = in_background(lambda: client.update(info))
        try:
            self._groups[client.url].broadcast([tensor for _, tensor in chunk], asked)
        except Exception as error:  # NCCL's are RuntimeErrors of many kinds
            self._drop(client)
            cause = _cause(error, asked)
            if isinstance(cause, AlignkitError):
                raise cause from error
            raise Unreachable(
                f"rollout.transfer: sending weights to {client.url} broke off ({first_line(error)}); "
                f"{RESUME}"
            ) from error

    def sent(self) -> None:
        """Nothing to do."""

    def _drop(self, client: Client) -> None:
        group = self._groups.pop(client.url, None)
        if group is not None:
            group.abort()


class Group:
    """This process, rank 0, and the workers of one server.

    size  processes in all
    """

    def __init__(self, size: int, device: torch.device, timeout: float):
        self.size = size
        self.device = device
        self.timeout = timeout
        # Longer than anything here waits: torch's own watchdog would end the whole process.
        self.patience = timedelta(seconds=10 * timeout)
        self.store = dist.TCPStore("127.0.0.1", 0, 1, True, self.patience)
        self.backend: Any = None

    def join(self) -> None:
        """Enter the group; returns when all workers have."""
        self.backend = self._made()
        one = torch.zeros(1, device=self.device)
        self._wait([self.backend.allreduce([one])], lambda: None)

    def _made(self) -> Any:
        from torch.distributed.distributed_c10d import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = self.patience
        return ProcessGroupNCCL(self.store, 0, self.size, options)

    def unique_id(self, joined: "Future[None]") -> bytes:
        """NCCL's name of the group, by which the workers find it. torch keeps it under the number
        of the communicator.
        """
        end = time.monotonic() + self.timeout
        while not self.store.check(["0"]):
            if joined.done():
                joined.result()
            if time.monotonic() > end:
                raise ResourceError(f"NCCL gave no unique id in {self.timeout:g} s")
            time.sleep(LOOK_EVERY)
        return self.store.get("0")

    def broadcast(self, tensors: Sequence[Tensor], asked: "Future[None]") -> None:
        """Send tensors to all workers, which the server was `asked` to take; returns when they have loaded
        them. What the server answers where it did not is raised.
        """

        def look() -> None:
            if asked.done():
                asked.result()

        self._wait([self.backend.broadcast(tensor, 0) for tensor in tensors], look)
        asked.result(self.timeout)

    def _wait(self, works: Sequence[Any], look: Callable[[], None]) -> None:
        """Until all works are done; never longer than `timeout` without one."""
        for work in works:
            end = time.monotonic() + self.timeout
            while not work.is_completed():
                look()
                if time.monotonic() > end:
                    raise ResourceError(f"nothing arrived in {self.timeout:g} s")
                time.sleep(LOOK_EVERY)
            work.wait()  # raises where it failed

    def abort(self) -> None:
        """Leave the group, whatever is under way in it."""
        with suppress(Exception):
            self.backend.abort()


def _cause(error: Exception, asked: "Future[None]") -> BaseException:
    """What the server says of a broadcast that failed, if it says something soon; else the failure."""
    with suppress(TimeoutError):
        return asked.exception(GRACE) or error
    return error


def in_background(act: Callable[[], None]) -> "Future[None]":
    """The result of `act`, which runs in a thread that a process does not wait for at its end."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            act()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def nccl_is_there() -> bool:
    """Whether the installed torch has NCCL."""
    return dist.is_nccl_available()
