"""The script of `make gpu` on the CPU with the smallest shapes, so that it does not fail on a GPU for
a slip of the keys.
"""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def written(page, *options):
    done = subprocess.run(
        [sys.executable, HERE / "measure.py", "--out", page, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return page.read_text()


@pytest.mark.long
def test_the_whole_page_is_written(tmp_path):
    text = written(tmp_path / "gpu.md", "--without-trl")
    assert "Left out" not in text, text
    for name in ("dpo", "rpg", "grpo"):
        for layout in ("padded, sdpa", "shared prefix, sdpa"):
            (line,) = [
                row for row in text.splitlines() if row.startswith(f"| tiny | {name} | {layout} |")
            ]
            assert line.endswith("| yes |"), line
    for way in ("ipc", "nccl"):
        assert f"- weights by {way}: not sent; it takes " in text
    for name in ("dpo", "grpo"):
        assert sum(text.count(f"| tiny | {name} | {kernel} (") for kernel in ("sdpa", "eager")) == 1


@pytest.mark.long
def test_trl_is_timed_beside_it(tmp_path):
    """Liger's kernels need a GPU."""
    text = written(tmp_path / "gpu.md")
    for name in ("dpo", "grpo"):
        assert f"- TRL's {name} on tiny, without Liger: " in text, text
