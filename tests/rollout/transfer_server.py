"""The smallest stand-ins for what no machine without a GPU has: NCCL is gloo, and the memory of a GPU
that processes share is a file that they map. `TransferEngine` answers the paths of vLLM 0.32's weight
transfer with them, and takes no field that vLLM's dataclasses do not have.

`vllm_on_a_cpu.py` puts the same stand-ins into a real vLLM.
"""

import base64
import pickle
from datetime import timedelta

import torch
import torch.distributed as dist
from small_server import TransformersEngine

from alignkit.rollout import transfer_ipc, transfer_nccl, transfer_ways

SECONDS = timedelta(seconds=60)
ID_BYTES = 128  # of an ncclUniqueId
INIT = {
    "nccl": {"master_address", "master_port", "rank_offset", "world_size", "nccl_unique_id_b64"},
    "ipc": {"packed"},
}
INIT["nccl"] |= {"packed", "packed_buffer_size_bytes", "packed_num_buffers"}
UPDATE = {
    "nccl": {"names", "dtype_names", "shapes"},
    "ipc": {"names", "dtype_names", "shapes", "ipc_handles", "ipc_handles_pickled", "tensor_sizes"},
}


class GlooGroup(transfer_nccl.Group):
    """The trainer's side: the port of the store takes the place of NCCL's unique id."""

    def _made(self):
        return dist.ProcessGroupGloo(self.store, 0, self.size, SECONDS)

    def unique_id(self, joined):
        return str(self.store.port).encode().ljust(ID_BYTES)


def without_gpus(monkeypatch, folder):
    """Put the stand-ins into the trainer; `folder` holds the memory that is shared."""
    paths = (folder / f"buffer{number}" for number in range(10**6))

    def mapped(size, device):
        path = str(next(paths))
        buffer = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        return buffer, {"cpu": (path, size, None, None, None, None, 0)}

    monkeypatch.setattr(transfer_ways, "on_gpu", lambda device: True)
    monkeypatch.setattr(transfer_nccl, "nccl_is_there", lambda: True)
    monkeypatch.setattr(transfer_nccl, "Group", GlooGroup)
    monkeypatch.setattr(transfer_ipc, "shared_buffer", mapped)


class TransferEngine(TransformersEngine):
    """A server of one worker that was started for `backend`."""

    def __init__(self, folder, backend):
        super().__init__(folder)
        self.backend = backend
        self.active = False
        self.group = None
        self.arrived = {}  # the tensors of the present update
        self.asked = []  # what came with each request of the transfer

    def answer(self, path, asked):
        steps = {
            "/init_weight_transfer_engine": self.join,
            "/start_weight_update": self.start,
            "/update_weights": self.update,
            "/finish_weight_update": self.finish,
        }
        if path in steps:
            self.calls.append(path)
            self.asked.append((path, asked))
            steps[path](**(asked or {}))
            return {}
        if path == "/get_world_size":
            return {"world_size": 1}
        answer = super().answer(path, asked)
        if path == "/server_info":
            transfer = {"backend": self.backend} if self.backend else None
            answer["vllm_config"]["weight_transfer_config"] = transfer
            answer["vllm_env"] = {"VLLM_ALLOW_INSECURE_SERIALIZATION": True}
        return answer

    def join(self, init_info):
        assert init_info.keys() <= INIT[self.backend]
        assert init_info["packed"] == (self.backend == "ipc")
        if self.backend == "nccl":
            name = base64.b64decode(init_info["nccl_unique_id_b64"], validate=True)
            assert len(name) == ID_BYTES
            assert init_info["rank_offset"] == 1
            store = dist.TCPStore("127.0.0.1", int(name), None, False, SECONDS)
            self.group = dist.ProcessGroupGloo(store, 1, init_info["world_size"], SECONDS)
            self.group.allreduce([torch.zeros(1)]).wait()

    def start(self):
        if self.active:
            raise RuntimeError("start_weight_update called while a weight update is already active")
        self.active = True

    def update(self, update_info):
        assert update_info.keys() <= UPDATE[self.backend]
        if not self.active:
            raise RuntimeError("start_weight_update must be called before update_weights")
        self.active = False  # until this one is taken in
        receive = self.received if self.backend == "nccl" else self.read
        for name, tensor in receive(**update_info):
            if self.arrived.keys() & {name}:
                raise RuntimeError(f"{name} came twice")
            if name not in self.model.state_dict():
                raise KeyError(name)
            self.arrived[name] = tensor
        self.active = True

    def received(self, names, dtype_names, shapes):
        for name, dtype, shape in zip(names, dtype_names, shapes, strict=True):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast(tensor, 0).wait()
            yield name, tensor

    def read(self, names, dtype_names, shapes, ipc_handles_pickled, tensor_sizes):
        handles = base64.b64decode(ipc_handles_pickled)
        (handle,) = pickle.loads(handles).values()  # noqa: S301  as vLLM does
        path, size, *_ = handle
        memory = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        parts = memory[: sum(tensor_sizes)].split(tensor_sizes)
        for name, dtype, shape, part in zip(names, dtype_names, shapes, parts, strict=True):
            yield name, part.clone().view(getattr(torch, dtype)).view(shape)

    def finish(self, weight_version=None):
        if not self.active:
            raise RuntimeError("finish_weight_update called without a matching start")
        # As in vLLM, what did not come is not missed.
        self.model.load_state_dict(self.arrived, strict=False)
        self.active, self.arrived = False, {}
