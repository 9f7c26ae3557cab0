"""By which way the weights get to the servers: what the recipe asks for, and what the servers were
started for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from alignkit.config.rollout import RolloutConfig
from alignkit.errors import ConfigError, ModelError
from alignkit.rollout.transfer import Way
from alignkit.rollout.transfer_ipc import IPC
from alignkit.rollout.transfer_nccl import NCCL


def way_of(
    config: RolloutConfig, about: Sequence[Mapping[str, Any]], device: torch.device
) -> Way | None:
    """How the weights of a policy on `device` get to servers that say this `about` themselves; None:
    by a file. ConfigError, ModelError where the way that the recipe asks for cannot be had.
    """
    name = config.transfer
    if name is None:
        backends = {server["transfer"] for server in about}
        name = backends.pop() if len(backends) == 1 else "file"
        elsewhere = any(url.startswith("https:") for url in config.urls)
        usable = name == "nccl" or (name == "ipc" and not elsewhere)
        wants_a_file = config.ahead or config.weights_dir is not None
        if wants_a_file or not (usable and on_gpu(device)):
            name = "file"
    if name == "file":
        return None

    check_gpu(config, device)
    for url, server in zip(config.urls, about, strict=True):
        if server["transfer"] != name:
            raise ModelError(
                f"rollout.transfer: the server at {url} was not started for {name}; start it with "
                f'--weight-transfer-config \'{{"backend": "{name}"}}\', or set rollout.transfer=file'
            )
        if name == "ipc" and not server["unpickles"]:
            raise ModelError(
                f"rollout.transfer: the server at {url} does not take handles of shared memory; start "
                "it with VLLM_ALLOW_INSECURE_SERIALIZATION=1, or set rollout.transfer=file"
            )
    return IPC(device) if name == "ipc" else NCCL(device, config.timeout)


def check_gpu(config: RolloutConfig, device: torch.device) -> None:
    """ConfigError where tensors shall leave a GPU and the policy is on none."""
    if config.transfer in ("nccl", "ipc") and not on_gpu(device):
        raise ConfigError(
            f"rollout.transfer: {config.transfer} takes the weights from the policy's GPU, and the "
            f"policy is on the {device.type}; leave it out, or set rollout.transfer=file"
        )


def on_gpu(device: torch.device) -> bool:
    """Whether tensors there can leave by NCCL or CUDA's shared memory."""
    return device.type == "cuda"
