"""Runs a script on two processes of this machine beside the test, and leaves none of them behind."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

TIMEOUT = 240  # seconds


def run_to_its_end(command: list[str], timeout: float = TIMEOUT) -> tuple[int, str]:
    """Exit code and stderr of a command that starts processes of its own; all of them are killed if
    it takes too long.
    """
    with started(command) as finish:
        return finish(timeout)


@contextmanager
def started(command: list[str]) -> Iterator:
    """A command in a process group of its own; gives a function that waits for it: seconds -> exit
    code and stderr.
    """
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with tempfile.TemporaryFile(
        "w+"
    ) as errors:  # a pipe that nobody reads would fill up and stop the writer
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )

        def finish(timeout: float = TIMEOUT) -> tuple[int, str]:
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
            errors.seek(0)
            said = errors.read()
            assert code is not None, f"not done after {timeout} s; stderr ends with\n{said[-3000:]}"
            return code, said

        try:
            yield finish
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def on_two_processes(script: str, *arguments: object) -> Iterator[None]:
    """`script` under torchrun while the block runs; on leaving the block it has ended well."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with started([*launch, script, *map(str, arguments)]) as finish:
        yield
        code, said = finish()
        assert code == 0, said[-3000:]
