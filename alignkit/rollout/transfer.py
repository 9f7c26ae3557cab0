"""Giving servers the policy's weights without a file, by vLLM's own weight transfer: init, start,
update and finish over HTTP, the tensors over NCCL or through the memory of a shared GPU.

This process speaks what vLLM documents for trainers that do not import vLLM, so vLLM can stay in an
environment of its own: https://docs.vllm.ai/en/latest/training/weight_transfer/.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from alignkit.errors import AlignkitError, ResourceError
from alignkit.policies.weight_stream import Digest, WeightStream
from alignkit.rollout.client import Client
from alignkit.rollout.fleet import Fleet

CHUNK = 1 << 28  # bytes of the tensors that one request announces
Chunk = Sequence[tuple[str, Tensor]]


class Way(Protocol):
    """How tensors get from this process to a server."""

    everywhere: bool  # every process of the run brings tensors to the GPU it is on

    def begin(self, stream: WeightStream) -> None:
        """Get ready for one update. Called on every process that brings tensors."""
        ...

    def join(self, client: Client) -> None:
        """Get ready for one server that this process has not given its present weights."""
        ...

    def pack(self, chunk: Chunk) -> Mapping[str, Any]:
        """What the servers are told of `chunk`. Called on every process that brings tensors."""
        ...

    def send(self, client: Client, info: Mapping[str, Any], chunk: Chunk) -> None:
        """Have a server take `chunk` in, and return when it has."""
        ...

    def sent(self) -> None:
        """All servers have the chunk. Called on every process that brings tensors."""
        ...


class Transfer:
    """Gives a fleet of servers the weights, tensor by tensor.

    pushes  whether this process speaks to the servers
    """

    def __init__(self, fleet: Fleet, way: Way, *, pushes: bool):
        self.fleet = fleet
        self.way = way
        self.pushes = pushes
        self.version = ""  # what the servers were given last

    def send(self, stream: WeightStream, number: int) -> str:
        """Give the servers what the stream gives, and return its version, `number` and the digest;
        "" in a process that only takes part.

        Every process of the run calls it. What goes wrong is raised at the end, when the other
        processes have got this one's shards. Until then no server holds a version.
        """
        if not (self.pushes or self.way.everywhere):
            stream.take_part()
            return ""

        failure: AlignkitError | None = None
        digest = Digest()
        self.way.begin(stream)
        last = self.version
        self.version = ""
        if self.pushes:
            failure = self._tried(self.fleet.on_all, partial(self._begin, last=last))

        for chunk in chunks(stream):
            info = self.way.pack(chunk)
            if self.pushes and failure is None:
                send = partial(self.way.send, info=info, chunk=chunk)
                failure = self._tried(self.fleet.on_alive, send)
                for name, tensor in chunk:
                    digest.add(name, tensor)
            self.way.sent()

        if failure is not None:
            raise failure
        if self.pushes:
            version = f"{number}:{digest.done()}"
            self.fleet.on_alive(lambda client: client.finish(version))
            self.version = version
        return self.version

    def _begin(self, client: Client, last: str) -> None:
        if not last or client.version() != last:
            self.way.join(client)
        client.begin()

    def _tried(
        self, on_servers: Callable[[Callable[[Client], None]], None], act: Callable[[Client], None]
    ) -> AlignkitError | None:
        """The error of `act`, if any; servers in which something waits then go on, under no version."""
        try:
            on_servers(act)
        except AlignkitError as error:
            with suppress(ResourceError):
                self.fleet.on_alive(Client.resume)
            return error
        return None


def chunks(stream: WeightStream) -> Iterator[list[tuple[str, Tensor]]]:
    """The tensors of a stream in groups of at most `CHUNK` bytes, or of one that is larger. Behind
    one another in memory, all tensors of a group begin at multiples of their elements' size.
    """
    chunk: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in stream:
        if chunk and (size + tensor.nbytes > CHUNK or size % tensor.element_size()):
            yield chunk
            chunk = []
            size = 0
        chunk.append((name, tensor.contiguous()))
        size += tensor.nbytes
    if chunk:
        yield chunk


def described(chunk: Chunk) -> dict[str, list[Any]]:
    """The fields that both backends want to know of tensors."""
    return {
        "names": [name for name, _ in chunk],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in chunk],
        "shapes": [list(tensor.shape) for _, tensor in chunk],
    }
