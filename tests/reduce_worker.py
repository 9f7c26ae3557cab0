"""Run by torchrun in a test: the gradient of bfloat16 weights, summed over processes in either dtype,
beside the processes' own gradients.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import save_file
from world import pairs

from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.config.train import TrainConfig
from alignkit.distributed.launcher import end
from alignkit.objectives.preference.sft import SFT
from alignkit.policies.dtensors import full
from alignkit.policies.load import load_pair
from alignkit.policies.sharding import make_shards


def gradient(model: Path, rank: int, shards=None) -> dict[str, torch.Tensor]:
    """Of the summed log-probs of this process's row: whole, and summed over processes where the
    weights are shards.
    """
    plan = SFT().plan
    pair = load_pair(
        ModelConfig(name_or_path=str(model), dtype="bfloat16"),
        ReferenceConfig(),
        None,
        plan,
        fixed_data=True,
        shards=shards,
    )
    pair.logps([pairs(8, k=1)[rank]], plan).policy.sum().backward()
    return {name: full(p.grad) for name, p in pair.base.named_parameters()}


if __name__ == "__main__":
    model, out = map(Path, sys.argv[1:])
    accelerator = Accelerator(cpu=True)
    rank, processes = accelerator.process_index, accelerator.num_processes

    own = gradient(model, rank)
    for name, value in own.items():
        parts = [torch.empty_like(value) for _ in range(processes)]
        dist.all_gather(parts, value.contiguous())
        own[name] = torch.stack(parts)
    found = {"own": own}
    for name, dtype in (("weights", None), ("float32", "float32")):
        shards = make_shards("cpu", processes, TrainConfig(shard=True, reduce_dtype=dtype))
        found[name] = gradient(model, rank, shards)

    if accelerator.is_main_process:
        for name, tensors in found.items():
            content = {key: value.contiguous().clone() for key, value in tensors.items()}
            save_file(content, out / f"{name}.safetensors")
    end(accelerator)
