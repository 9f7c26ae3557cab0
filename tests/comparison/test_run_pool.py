"""Worker processes: every item is worked on once, a crash costs one item, and a stop waits for the
workers.
"""

import os
import signal
import time
from functools import partial

import pytest

from alignkit.comparison.run_pool import run_apart


def note(item, folder):
    if item == "exits":
        os._exit(3)
    if item == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "slow":
        signal.signal(signal.SIGTERM, lambda *_: (folder / "stopped").touch() or os._exit(143))
        (folder / "began").touch()
        time.sleep(60)
    (folder / item).write_text(str(os.getpid()))


def test_a_crash_costs_one_item_and_no_other(tmp_path):
    crashes, seen = {}, set()
    items = ["a", "exits", "b", "killed", "c", "d"]
    crashed = crashes.__setitem__
    run_apart(items, partial(note, folder=tmp_path), 2, crashed, seen.update)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "c", "d"]
    assert crashes == {
        "exits": "its process ended with exit code 3",
        "killed": "its process was ended by SIGKILL (out of memory?)",
    }
    assert str(os.getpid()) not in {file.read_text() for file in tmp_path.iterdir()}
    assert seen <= set(items)


def test_a_stop_reaches_the_workers_once_and_waits(tmp_path):
    class Stop(Exception):
        pass

    def watch(now):
        if (tmp_path / "began").exists():
            raise Stop

    with pytest.raises(Stop):
        run_apart(["slow", "never"], partial(note, folder=tmp_path), 1, lambda *_: None, watch)
    assert {file.name for file in tmp_path.iterdir()} == {"began", "stopped"}
