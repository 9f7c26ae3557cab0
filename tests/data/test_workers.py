"""Rows that several processes tokenise: the same bundles and the same report as one makes."""

import gc
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from alignkit.config.data import DataConfig
from alignkit.data import cache as cache_module
from alignkit.data import load_bundles
from alignkit.distributed.forked import in_order, number_of_workers, passed_over
from alignkit.errors import ModelError, ResourceError

ROWS = [
    {"prompt": f"the cat {i}", "chosen": f" sat on {i}", "rejected": f" sat {i}"} for i in range(20)
]
BAD = [
    {"prompt": "a", "chosen": " same", "rejected": " same"},
    {"prompt": "a", "chosen": None, "rejected": " b"},
    {"prompt": "a", "chosen": " <unk> x", "rejected": " b"},
    ROWS[3],
    {"prompt": "", "chosen": " sat", "rejected": " on"},
]


def write(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def load(folder, tokenizer, workers, family="pair", **settings):
    """Arrow file, report and warnings of what so many processes make of the files in `folder`."""
    os.environ["ALIGNKIT_CACHE"] = str(folder / f"cache-{workers}-{family}")
    config = DataConfig(train=str(folder / "*.jsonl"), workers=workers, **settings)
    bundles, report = load_bundles(config, family, tokenizer)
    (file,) = Path(os.environ["ALIGNKIT_CACHE"]).glob("data/*/rows.arrow")
    return file.read_bytes(), bundles.fingerprint, report.lines(), report.warnings()


@pytest.fixture(autouse=True)
def many(monkeypatch):
    """Any number of rows is many, in small parts."""
    monkeypatch.setenv("ALIGNKIT_CACHE", "")
    monkeypatch.setattr(cache_module, "FEW", 0)
    monkeypatch.setattr("alignkit.data.checking.PART", 3)


@pytest.mark.parametrize("family", ["pair", "labelled"])
def test_three_processes_make_what_one_makes(tmp_path, kinds, family):
    write(tmp_path / "a.jsonl", [*ROWS, *BAD])
    write(tmp_path / "b.jsonl", [*BAD, *ROWS])
    settings = {"max_length": 12, "on_bad_row": "drop"}
    one = load(tmp_path, kinds["chat"], 1, family, **settings)
    three = load(tmp_path, kinds["chat"], 3, family, **settings)
    assert one == three
    assert any("a.jsonl:21, b.jsonl:1" in line for line in one[2]), "rows are named by their files"


def test_an_error_of_a_process_is_raised_here(tmp_path, kinds):
    chat = {"prompt": [{"role": "user", "content": "a"}], "completion": "b"}
    write(tmp_path / "a.jsonl", [chat] * 9)
    with pytest.raises(ModelError, match="no chat template"):
        load(tmp_path, kinds["byte_level"], 2, "sequence")


def test_order_and_number_of_pieces_in_memory():
    begun = []

    def pieces():
        for i in range(40):
            begun.append(i)
            yield i

    results = in_order(lambda i: (time.sleep(0.01 * (i % 3)), i * i)[1], pieces(), 2)
    assert next(results) == 0
    assert len(begun) <= 6, "no more are begun than are worked on"
    assert list(results) == [i * i for i in range(1, 40)]


def test_a_process_that_is_ended_is_an_error():
    def end(number):
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ResourceError, match=r"data\.workers=1"):
        list(in_order(end, range(3), 2))


def test_processes_end_with_their_parent(tmp_path):
    def sleep(number):
        (tmp_path / str(os.getpid())).touch()
        time.sleep(60)

    def work():
        list(in_order(sleep, range(2), 2))

    parent = multiprocessing.get_context("fork").Process(target=work)
    parent.start()
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    parent.kill()
    parent.join()
    until = time.monotonic() + 5
    while any(_runs(int(path.name)) for path in tmp_path.iterdir()):
        assert time.monotonic() < until, "a process outlives the one that started it"
        time.sleep(0.01)


def test_a_signal_to_the_whole_group_ends_all(tmp_path):
    """As Ctrl-C in a terminal and `timeout` send it."""

    def sleep(number):
        (tmp_path / str(os.getpid())).touch()
        time.sleep(0.05)

    def work():
        os.setpgrp()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        list(in_order(sleep, range(10_000), 2))

    parent = multiprocessing.get_context("fork").Process(target=work)
    parent.start()
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    os.killpg(parent.pid, signal.SIGTERM)
    parent.join(20)
    assert parent.exitcode == 143
    assert not any(_runs(int(path.name)) for path in tmp_path.iterdir())


def _runs(process: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_auto_is_one_for_each_core(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(64)))
    assert number_of_workers("auto") == 8
    assert number_of_workers(12) == 12


@pytest.fixture
def collector():
    """Looks at everything, as in a run; for the tests it passes over what the imports made."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("collector")
def test_the_collector_looks_at_everything_again_behind_the_block():
    with passed_over():
        assert gc.get_freeze_count() > 0
        with passed_over():  # no second one, whose end would be that of the first
            pass
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0
