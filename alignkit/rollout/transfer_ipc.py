"""Weights to servers on the trainer's own GPUs: each process copies them into a buffer of its GPU,
which the server's worker there reads (CUDA IPC).
"""

import base64
import pickle
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from alignkit.errors import ResourceError, first_line
from alignkit.policies.weight_stream import WeightStream
from alignkit.rollout import transfer
from alignkit.rollout.client import Client
from alignkit.rollout.transfer import Chunk, described


class IPC:
    """Sends tensors through one buffer on the GPU of each process. See `Way`."""

    everywhere = True

    def __init__(self, device: torch.device):
        self.device = device
        self.buffer: Tensor | None = None
        self.handles = ""

    def begin(self, stream: WeightStream) -> None:
        """Make the buffer, and learn how every GPU's is reached. A buffer is shared once and read
        once; the last update's is given back.
        """
        self.buffer = None
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()
        largest = max(tensor.nbytes for tensor in stream.shapes().values())
        size = max(transfer.CHUNK, largest)

        failure: RuntimeError | None = None
        own: dict[str, tuple[Any, ...]] = {}
        try:
            self.buffer, own = shared_buffer(size, self.device)
        except RuntimeError as error:  # out of memory, for one
            failure = error
        handles = [own]
        if _several():
            handles = [own] * dist.get_world_size()
            dist.all_gather_object(handles, own)
        if {} in handles:
            raise ResourceError(
                f"rollout.transfer: no GPU memory of {size >> 20} MiB could be shared with the servers "
                f"({first_line(failure) if failure else 'on another process'}); leave them less of it, "
                "or set rollout.transfer=file"
            ) from failure
        everyone = {gpu: handle for each in handles for gpu, handle in each.items()}
        # The one form in which vLLM takes them over HTTP. Nothing is ever read from a pickle here.
        self.handles = base64.b64encode(pickle.dumps(everyone)).decode()

    def join(self, client: Client) -> None:
        """Say that tensors stand behind one another in a buffer."""
        client.join({"packed": True})

    def pack(self, chunk: Chunk) -> Mapping[str, Any]:
        """Copy the tensors into the buffer, and wait until every process has."""
        assert self.buffer is not None
        position = 0
        for _, tensor in chunk:
            content = tensor.reshape(-1).view(torch.uint8)
            self.buffer[position : position + len(content)].copy_(content)
            position += len(content)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.sent()
        sizes = [tensor.nbytes for _, tensor in chunk]
        return {**described(chunk), "tensor_sizes": sizes, "ipc_handles_pickled": self.handles}

    def send(self, client: Client, info: Mapping[str, Any], chunk: Chunk) -> None:
        """The server copies what it is told of before it answers."""
        client.update(info)

    def sent(self) -> None:
        """Wait for the other processes: nobody changes a buffer that is being read."""
        if _several():
            dist.barrier()


def shared_buffer(size: int, device: torch.device) -> tuple[Tensor, dict[str, tuple[Any, ...]]]:
    """A buffer of bytes on a GPU, and by the GPU's name how another process opens it."""
    buffer = torch.empty(size, dtype=torch.uint8, device=device)
    _, how = reduce_tensor(buffer)
    return buffer, {str(torch.cuda.get_device_properties(device).uuid): how}


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
