"""Fetch the wheels that `make gpu` carries to a machine without a network: Python 3.12 on Linux with
torch, transformers, accelerate and peft installed there, and nothing else of ours.

    python tests/gpu/wheels.py      # into tests/gpu/wheels, about 10 MB
"""

import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "wheels"
LARGEST = 60 * 2**20  # bytes of all of them
# pydantic and what it needs, omegaconf and its parser, TRL's own code, the command line.
WHEELS = [
    "pydantic==2.14.3",
    "pydantic-core==2.50.4",
    "annotated-types",
    "typing-extensions",
    "typing-inspection",
    "omegaconf==2.4.0",
    "trl==1.16.0",
]


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    target = ["--python-version", "3.12", "--platform", "manylinux2014_x86_64"]
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(FOLDER), *target]
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", *options, *WHEELS], check=True)

    size = sum(file.stat().st_size for file in FOLDER.iterdir())
    print(f"{len(list(FOLDER.iterdir()))} wheels, {size / 2**20:.1f} MiB in {FOLDER}")
    if size > LARGEST:
        raise SystemExit(f"they are more than {LARGEST / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
