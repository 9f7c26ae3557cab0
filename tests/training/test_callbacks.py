"""A user's callbacks: transformers' events in their order, and a stop that is heard."""

import json
import subprocess
import sys

import pytest
from transformers import trainer_callback
from world import pair_rows, run, save_model, write_rows

from alignkit.files import read_jsonl

CODE = """
import json
from transformers import TrainerCallback

class Notes(TrainerCallback):
    def __init__(self): self.events = []
    def on_train_begin(self, args, state, control, model=None, processing_class=None, **_):
        assert model is not None and processing_class is not None
        self.events.append(["begin", state.global_step, args.max_steps])
    def on_step_begin(self, args, state, control, **_): self.events.append(["step", state.global_step])
    def on_step_end(self, args, state, control, **_): self.events.append(["end", state.global_step])
    def on_evaluate(self, args, state, control, metrics=None, **_):
        metrics["eval_twice"] = 2 * metrics["eval_loss"]
        self.events.append(["evaluate", state.global_step])
    def on_log(self, args, state, control, logs=None, **_):
        self.events.append(["log", state.global_step, "loss" in logs])
    def on_save(self, args, state, control, **_): self.events.append(["save", state.global_step])
    def on_train_end(self, args, state, control, **_):
        with open(args.output_dir + "/events.json", "w") as file: json.dump(self.events, file)

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_): control.should_training_stop = state.global_step == 2

class Nothing: pass
"""


@pytest.fixture
def train(tmp_path, monkeypatch):
    save_model(tmp_path / "model")
    write_rows(tmp_path / "pairs.jsonl", pair_rows(8))
    write_rows(tmp_path / "held_out.jsonl", pair_rows(12)[8:])
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)

    def call(*overrides):
        settings = (
            "model.name_or_path=model data.train=pairs.jsonl data.eval=held_out.jsonl output_dir=run "
            "train.steps=4 train.batch_size=4 train.log_samples_every=0 train.eval_every=4 "
            "train.save_every=2"
        )
        return run("train", "dpo", *settings.split(), *overrides)

    return call


def test_events_in_their_order(train, tmp_path, monkeypatch):
    warned = []
    monkeypatch.setattr(trainer_callback.logger, "warning", warned.append)
    assert train("train.callbacks=[mine.py:Notes]") == 0
    assert not warned  # of a flow that the loop does not need
    events = json.loads((tmp_path / "run" / "events.json").read_text())
    assert events == [
        ["begin", 0, 4],
        *(["step", 0], ["end", 1], ["log", 1, True]),
        *(["step", 1], ["end", 2], ["log", 2, True], ["save", 2]),
        *(["step", 2], ["end", 3], ["log", 3, True]),
        *(["step", 3], ["end", 4], ["evaluate", 4], ["log", 4, True], ["save", 4]),
    ]
    last = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["eval_twice"] == 2 * last["eval_loss"]  # a callback may measure, too


def test_a_callback_stops_the_run(train, tmp_path):
    assert train("train.callbacks=[mine.py:Stop]") == 0
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 2
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.callbacks=[mine.py:Notes]", "--safe"], "--safe forbids it"),
        (["train.callbacks=[mine.py:Nothing]"], "not a subclass of transformers.TrainerCallback"),
        (["train.callbacks=[mine.py:Absent]"], "has no `Absent`"),
    ],
)
def test_what_is_refused(train, capsys, overrides, words):
    assert train(*overrides) == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.long
def test_a_run_without_any_does_not_import_the_trainer_or_peft(train, tmp_path):
    """They and others take seconds of its start, and so would Python's search for cycles in what is
    imported. In a process of its own, which has imported nothing yet.
    """
    settings = "model.name_or_path=model data.train=pairs.jsonl output_dir=run train.steps=1"
    code = (
        "import gc, sys; from alignkit.cli.main import main\n"
        f"sys.argv = ['alignkit', 'train', 'dpo', *{settings!r}.split()]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = ('peft', 'trl', 'transformers.trainer', 'transformers.trainer_utils', 'pandas',\n"
        "    'datasets', 'matplotlib', 'sklearn')\n"
        "print('left alone:', gc.get_freeze_count() > 200_000)\n"
        "print('heavy:', [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-2:] == ["left alone: True", "heavy: []"]
    assert (tmp_path / "run" / "model").is_dir()
