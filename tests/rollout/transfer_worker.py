"""Run by torchrun in test_transfer.py: two processes give a small server the weights of a sharded
policy with an adapter. The first one serves, pushes and writes what arrived.
"""

import sys
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from small_server import serving
from transfer_server import TransferEngine, without_gpus

from alignkit.config.model import AdapterConfig, ModelConfig, ReferenceConfig
from alignkit.config.rollout import RolloutConfig
from alignkit.config.train import TrainConfig
from alignkit.plan import Plan
from alignkit.policies.dtensors import like
from alignkit.policies.load import load_pair
from alignkit.policies.sharding import make_shards
from alignkit.rollout import VLLMSampler, transfer


def policy(folder, shards=None):
    """With an adapter that does something; by the same numbers in shards and without."""
    model = ModelConfig(name_or_path=str(folder), adapter=AdapterConfig(r=4, alpha=8))
    plan = Plan("rollout", anchors=())
    pair = load_pair(model, ReferenceConfig(), None, plan, fixed_data=False, shards=shards)
    with torch.no_grad():
        for parameter in pair.parameters():
            waves = torch.arange(parameter.numel()).sin().view(parameter.shape) / 4
            parameter.copy_(like(waves, parameter))
    return pair


def main(folder, out, way):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    pair = policy(folder, make_shards("cpu", dist.get_world_size(), TrainConfig(shard=True)))
    engine = TransferEngine(folder, way)
    with pytest.MonkeyPatch.context() as patches, TemporaryDirectory() as memory:
        without_gpus(patches, Path(memory))
        patches.setattr(transfer, "CHUNK", 2000)
        with serving(engine) if rank == 0 else nullcontext() as url:
            address = [url]
            dist.broadcast_object_list(address)
            config = RolloutConfig(url=address[0], max_new_tokens=6)
            sampler = VLLMSampler(pair, config, seed=0, pushes=rank == 0)
            sampler.sync()
            dist.barrier()
    if rank == 0:
        assert engine.version == sampler.version != ""
        state = engine.model.state_dict()
        save_file({name: value.clone() for name, value in state.items()}, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
