"""Weights to a real vLLM over NCCL and through the memory of this GPU, for `make gpu`: do the server's
samples have the trainer's log-probs, and how long does an update take?
"""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from gpu_world import GPU, model_of, tokenizer_of

from alignkit.batches import Draw
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.config.rollout import RolloutConfig
from alignkit.plan import Plan
from alignkit.policies.load import load_pair
from alignkit.rollout import VLLMSampler
from alignkit.rollout.colocated import OPTIONS

GPUS = {"ipc": 1, "nccl": 2}  # that each way needs
DTYPE = torch.bfloat16 if GPU else torch.float32  # a CPU runs it with stand-ins (test_transfer.py)
CLOSE = 0.1  # nats: bfloat16 on both sides, by other kernels
PATIENCE = 180  # seconds for vLLM to start


def transfers(size, left):
    """A line of the page for each way; `left` gives the seconds that are left."""
    vllm = shutil.which("vllm")
    lines = []
    for way, wanted in GPUS.items():
        if not GPU or torch.cuda.device_count() < wanted:
            lines.append(f"- weights by {way}: not sent; it takes {wanted} GPU")
        elif vllm is None:
            lines.append(f"- weights by {way}: not sent; there is no `vllm` on the PATH")
        elif left() < PATIENCE + 30:
            lines.append(f"- weights by {way}: not sent; the time was over")
        else:
            lines.append(sent(way, size, vllm))
    return lines


def sent(way, size, vllm):
    """Two updates, the second one timed, and samples after it."""
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        model_of(size, "cpu").to(DTYPE).save_pretrained(place)
        tokenizer_of(size).save_pretrained(place)
        url = stack.enter_context(served(way, Path(place), vllm))
        pair = load_pair(
            ModelConfig(name_or_path=place, dtype=str(DTYPE).removeprefix("torch.")),
            ReferenceConfig(),
            None,
            Plan("rollout", anchors=()),
            device="cuda:0" if GPU else "cpu",
            fixed_data=False,
        )
        config = RolloutConfig(
            url=url, transfer=way, max_new_tokens=32, start_timeout=PATIENCE, timeout=60
        )
        sampler = VLLMSampler(pair, config, seed=0)
        sampler.sync()
        with torch.no_grad():
            for parameter in pair.parameters():
                parameter.mul_(1.5)
        began = time.perf_counter()
        sampler.sync()
        seconds = time.perf_counter() - began
        apart = difference(pair, sampler)
    size_sent = sum(parameter.nbytes for parameter in pair.parameters())
    verdict = "agree" if apart < CLOSE else "DO NOT AGREE"
    return (
        f"- weights of {size} by {way} ({size_sent / 1e9:.1f} GB): {seconds:.2f} s, hashes included; "
        f"the server's log-probs and the trainer's {verdict}: {apart:.1e} apart on average"
    )


@torch.no_grad()
def difference(pair, sampler):
    """Mean distance of the server's log-probs from the trainer's, over sampled tokens."""
    prompts = [torch.arange(2, 10), torch.arange(20, 60)]
    apart = []
    for prompt, samples in zip(
        prompts, sampler.sample(prompts, Draw(4), step=0, prompt_ids=[0, 1])
    ):
        for sample in samples:
            ids = torch.cat([prompt, sample.ids])[None].to(pair.device)
            with pair.model() as model:
                logits = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            own = logits.gather(-1, sample.ids[:, None].to(pair.device))[:, 0].cpu()
            apart.append((own - sample.logps).abs())
    return float(torch.cat(apart).mean())


@contextmanager
def served(way, folder, vllm):
    """The address of a `vllm serve` of a model's folder, on this GPU or the next one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--dtype", "bfloat16", "--enforce-eager", *OPTIONS]
    options += ["--gpu-memory-utilization", "0.3", "--max-model-len", "1024"]
    options += ["--weight-transfer-config", f'{{"backend": "{way}"}}']
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": str(GPUS[way] - 1),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    server = subprocess.Popen(
        [vllm, "serve", str(folder), *options], env=environment, start_new_session=True
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
