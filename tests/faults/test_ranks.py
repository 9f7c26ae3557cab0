"""`--processes 2`: a rank that dies ends the run with its name, a signal leaves a checkpoint, and
both times the run goes on.
"""

import sys

import pytest
from two_processes import run_to_its_end
from world import pair_rows, run, save_model, write_rows

from alignkit.files import read_jsonl
from alignkit.training import checkpoint

MINE = """
import os, signal
from pathlib import Path
from alignkit import DPO

class Mine(DPO):
    '''In its 3rd step the second process is killed; later, in the 5th, the launcher is asked to stop. Each happens once.'''
    folder: str

    def loss(self, batch):
        place = Path(self.folder) / os.environ.get("RANK", "0")
        calls = len(place.read_text()) if place.exists() else 0
        place.open("a").write(".")
        if os.environ.get("RANK") == "1":
            if calls == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            if calls == 5:  # step 3 was called twice
                os.kill(os.getppid(), signal.SIGTERM)
        return super().loss(batch)
"""


@pytest.fixture
def train(tmp_path, monkeypatch):
    save_model(tmp_path / "model")
    (tmp_path / "mine.py").write_text(MINE)
    write_rows(tmp_path / "pairs.jsonl", pair_rows(10))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(name, *extra):
        (tmp_path / f"calls-{name}").mkdir(exist_ok=True)
        objective = f"objective={{import: '{tmp_path / 'mine.py'}:Mine', folder: {tmp_path / f'calls-{name}'}}}"
        settings = "train.steps=7 train.batch_size=4 train.save_every=1 train.eval_every=0 train.log_samples_every=0"
        paths = [
            f"model.name_or_path={tmp_path / 'model'}",
            f"data.train={tmp_path / 'pairs.jsonl'}",
        ]
        command = [
            "train",
            "dpo",
            *paths,
            f"output_dir={tmp_path / name}",
            objective,
            *settings.split(),
            *extra,
        ]
        if "--processes" not in extra:
            return run(*command)
        return run_to_its_end([sys.executable, "-m", "alignkit", *command])

    return call


@pytest.mark.long
def test_a_rank_that_dies_and_a_signal_end_the_run_and_it_goes_on(train, tmp_path, capsys):
    code, said = train("run", "--processes", "2")
    assert code == 128 + 9, said
    assert "alignkit: process 1 ended with exit code -9; the others were stopped" in said
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0].step == 2
    code, said = train("run", "--processes", "2", "--resume", "auto")
    assert code == 128 + 15, said
    assert "resumed from step-2" in said
    step = checkpoint.newest(tmp_path / "run" / "checkpoints")[0].step
    assert f"stopped by signal 15 after step {step}" in " ".join(said.split())
    assert train("run", "--resume", "auto") == 0  # on one process
    assert f"resumed from step-{step}" in capsys.readouterr().err
    assert train("whole") == 0
    rows, others = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "run"))
    assert [row["step"] for row in others] == list(range(1, 8))
    assert [row["loss"] for row in others] == pytest.approx([row["loss"] for row in rows], abs=1e-6)
