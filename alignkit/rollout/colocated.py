"""vLLM servers that a run starts itself and stops when it ends (`rollout.colocate`)."""

import atexit
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from alignkit.config.rollout import RolloutConfig
from alignkit.errors import ConfigError, ResourceError
from alignkit.rollout.protocol import Models

OPTIONS = [
    *("--host", "127.0.0.1"),
    "--enable-scale-out",
    *("--logprobs-mode", "processed_logprobs"),
    *("--generation-config", "vllm"),
]
IPC = ["--weight-transfer-config", '{"backend": "ipc"}']  # they read weights on the trainer's GPU

# The servers of this process by address, with the files that they write their log to.
_running: dict[str, subprocess.Popen[bytes]] = {}


def start_servers(config: RolloutConfig, models: Models, *, sleeps: bool) -> None:
    """Start `vllm serve` at each of the section's addresses where this process has not done so; all
    are stopped when the process ends. They load the model whose folder or name the policy has.

    `sleeps`: they are on the trainer's GPUs, one server for each, and free them between rollouts.
    Raises ConfigError without vLLM, ResourceError where a server ends at once.
    """
    program = shutil.which(config.program)
    if program is None:
        raise ConfigError(
            f"rollout.colocate: there is no program {config.program}; install vLLM in an "
            "environment of its own and set rollout.program=PATH/bin/vllm"
        )
    with models.model("policy") as model:
        policy: Any = model
        name = str(policy.name_or_path)
        dtype = str(policy.dtype).removeprefix("torch.")

    for number, url in enumerate(config.urls):
        if url in _running and _running[url].poll() is None:
            continue
        log = Path(tempfile.gettempdir()) / f"alignkit-vllm-{os.getpid()}-{number}.log"
        port = urlsplit(url).port or 8001
        command = [program, "serve", name, "--port", str(port), "--dtype", dtype, *OPTIONS]
        environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
        if sleeps:
            command += ["--enable-sleep-mode", "--gpu-memory-utilization", "0.4"]
            environment["CUDA_VISIBLE_DEVICES"] = str(number)
            if config.transfer != "file" and not config.ahead:
                command += IPC
                environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"

        # A group of its own: vLLM's workers end with it.
        with log.open("wb") as output:
            server = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        atexit.register(_stop, server)
        _running[url] = server
        try:
            code = server.wait(0.5)
        except subprocess.TimeoutExpired:
            continue
        raise ResourceError(f"rollout.colocate: vLLM ended at once with {code}; its log is {log}")


def _stop(server: "subprocess.Popen[bytes]") -> None:
    """End a server and the processes that it started."""
    if server.poll() is not None:
        return
    for signum in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(server.pid, signum)
        try:
            server.wait(10)
            return
        except subprocess.TimeoutExpired:
            continue
