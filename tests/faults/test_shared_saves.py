"""kill -9 of any process at any moment of a save that several processes make together: the last
checkpoint stays whole. `make test-faults` sets ALIGNKIT_KILLS=50, as many repeats.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

KILLS = int(os.environ.get("ALIGNKIT_KILLS", "3"))


def test_a_process_that_is_killed_in_a_save_leaves_the_last_checkpoint_whole(tmp_path):
    script = Path(__file__).with_name("shared_saves.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, script, tmp_path, str(KILLS), "0"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240 + 20 * KILLS,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]

    repeats = json.loads(ended.stdout.splitlines()[-1])
    assert len(repeats) == KILLS
    assert all(repeat["whole"] for repeat in repeats)
    if KILLS >= 20:
        assert sum(repeat["in a save"] for repeat in repeats) > KILLS // 4
        assert 0 < sum(repeat["first"] for repeat in repeats) < KILLS
