"""The script of `make gpu` on the CPU with the smallest shapes, so that it does not fail on a GPU for
a slip of the keys.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_the_whole_page_is_written(tmp_path):
    page = tmp_path / "gpu.md"
    done = subprocess.run(
        [sys.executable, HERE / "measure.py", "--out", page],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    text = page.read_text()
    for name in ("dpo", "rpg", "grpo"):
        for layout in ("padded, sdpa", "shared prefix, sdpa"):
            (line,) = [
                row for row in text.splitlines() if row.startswith(f"| tiny | {name} | {layout} |")
            ]
            assert line.endswith("| yes |"), line
    assert text.count("| tiny | dpo | sdpa") + text.count("| tiny | dpo | eager") == 1
    left_out = text.partition("Left out:")[2]
    assert all("Liger" in line for line in left_out.splitlines() if line.startswith("- ")), text
    assert "TRL's dpo on tiny, without Liger" in text
