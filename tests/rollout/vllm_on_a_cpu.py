"""A plugin for a real vLLM on a machine without a GPU: its weight transfer runs as it is, but for the
same stand-ins as in transfer_server.py: NCCL is gloo, and shared memory of a GPU a mapped file.

`environment` gives what `vllm serve` has to be started with to find it.
"""

import os
from pathlib import Path


def environment(folder):
    """`folder` gets the package metadata by which vLLM finds its plugins."""
    about = folder / "vllm_on_a_cpu-1.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-on-a-cpu\nVersion: 1\n")
    entry = "[vllm.general_plugins]\nvllm_on_a_cpu = vllm_on_a_cpu:register\n"
    (about / "entry_points.txt").write_text(entry)
    paths = [str(folder), str(Path(__file__).parent)]
    return {"PYTHONPATH": os.pathsep.join(paths), "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}


class Gloo:
    """In the place of vLLM's PyNcclCommunicator."""

    def __init__(self, unique_id, rank, world_size, device):
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        timeout = timedelta(seconds=60)
        store = dist.TCPStore("127.0.0.1", int(unique_id), None, False, timeout)
        self.group = dist.ProcessGroupGloo(store, rank, world_size, timeout)
        self.group.allreduce([torch.zeros(1)]).wait()

    def broadcast(self, tensor, src, stream=None):
        self.group.broadcast(tensor, src).wait()

    def destroy(self):
        pass


def register():
    """Called by vLLM in each of its processes."""
    from types import SimpleNamespace

    import torch
    from torch.multiprocessing import reductions
    from vllm.distributed.weight_transfer import nccl_common

    def opened(path, size, *_):
        return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)

    nccl_common.uid_init_process_group = Gloo
    reductions.rebuild_cuda_tensor = opened
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid="cpu")
    torch.cuda.current_stream = lambda device=None: None
    torch.accelerator.synchronize = lambda device=None: None
    torch.accelerator.current_device_index = lambda: 0
