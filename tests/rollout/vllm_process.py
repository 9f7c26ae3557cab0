"""Real `vllm serve` processes for tests, from the environment that `make test-vllm` makes."""

import os
import signal
import socket
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from vllm_env import ENV

from alignkit.rollout.colocated import OPTIONS

ON_A_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
PYTHON = Path(os.environ.get("ALIGNKIT_VLLM_PYTHON", ENV / "bin" / "python"))


def _missing():
    """Why there is no vLLM, or None."""
    failed = PYTHON.parents[1] / ".failed"
    if failed.is_file():
        return failed.read_text()
    return None if PYTHON.is_file() else "run `make test-vllm`"


needs_vllm = pytest.mark.skipif(
    _missing() is not None, reason=f"no vLLM in {PYTHON.parents[1]}: {_missing()}"
)


@contextmanager
def vllm(model, port=0, more=(), environment=None):
    """A server process as the documentation starts it, with `more` options; its address."""
    if not port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    options = ["--port", str(port), "--dtype", "float32", "--enforce-eager", *OPTIONS, *more]
    server = subprocess.Popen(
        [PYTHON.with_name("vllm"), "serve", str(model), *options],
        env={**os.environ, **ON_A_CPU, "VLLM_SERVER_DEV_MODE": "1", **(environment or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield server, f"http://127.0.0.1:{port}"
    finally:
        kill(server)


def kill(server):
    """End a server and its workers at once."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
