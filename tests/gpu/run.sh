#!/usr/bin/env bash
# On the machine with the GPU: install the carried wheels beside what is there, and measure.
# Usage: tests/gpu/run.sh [FILE]    the page that is written (default: docs/results/gpu.md)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT

if [ -d "$here/wheels" ]; then
    python3 -m pip install --quiet --no-index --no-deps --target "$packages" "$here"/wheels/*.whl
fi
export PYTHONPATH="$root:$packages" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
timeout 540 python3 "$here/measure.py" --out "${1:-$root/docs/results/gpu.md}"
