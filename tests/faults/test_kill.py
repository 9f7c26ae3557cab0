"""kill -9 at random moments while every step is saved: every restart goes on, and the end is bit
for bit the same.

`make test-faults` sets ALIGNKIT_KILLS=50: repeats over the three recipes together. A repeat is a
run that is killed up to three times and then finishes.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from world import pair_rows, save_model, write_rows

from alignkit.files import read_jsonl
from alignkit.training import checkpoint

REPEATS = int(os.environ.get("ALIGNKIT_KILLS", "5"))
KILLS = 3  # at most, in one repeat
RECIPES = {
    "dpo": [
        "data.train={world}/pairs.jsonl",
        "objective.beta=0.5",
        "data.eval={world}/held_out.jsonl",
        "train.eval_every=3",
    ],
    "rpg": ["data.train={world}/prompts.jsonl", "rewards=[{{function: '{world}/mine.py:noisy'}}]"],
    "egpo": ["data.train={world}/prompts.jsonl", "judge.function={world}/mine.py:longer"],
}
SETTINGS = (
    "train.steps=10 train.batch_size=4 train.save_every=1 train.warmup_steps=2 train.log_samples_every=0 train.epochs=null "
    "train.learning_rate=0.01 rollout.completions=2 rollout.max_new_tokens=4"
)
MINE = """
import random
import numpy

def noisy(prompts, completions, **columns):
    return [len(c) + random.random() + numpy.random.rand() for c in completions]

def longer(prompts, first, second):
    return [float(len(a) > len(b)) if len(a) != len(b) else 0.5 for a, b in zip(first, second)]
"""
tally = {"repeats": 0, "kills": 0, "kills during a save": 0, "restarts from a checkpoint": 0}


class Zygote:
    """A process that starts runs; see zygote.py."""

    def __init__(self, log: Path, model: Path):
        self.log = log
        command = [sys.executable, Path(__file__).with_name("zygote.py"), log, model]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def run(self, arguments, kill_after=None):
        """How the run ended (-9: killed) and the seconds it took."""
        self.process.stdin.write(json.dumps([str(a) for a in arguments]) + "\n")
        self.process.stdin.flush()
        handle, began = os.pidfd_open(int(self.process.stdout.readline())), time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it was done before
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)
        code = int(self.process.stdout.readline())
        return code, time.monotonic() - began


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    (folder / "mine.py").write_text(MINE)
    write_rows(folder / "pairs.jsonl", pair_rows(10))
    write_rows(folder / "held_out.jsonl", pair_rows(13)[10:])
    write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in pair_rows(10)])
    return folder


@pytest.fixture(scope="module")
def zygote(world):
    made = Zygote(world / "log.txt", world / "model")
    yield made
    made.process.stdin.close()
    made.process.wait(timeout=30)
    print("\n" + ", ".join(f"{name}: {count}" for name, count in tally.items()))


def command(world, recipe, out):
    paths = [f"model.name_or_path={world / 'model'}", f"output_dir={out}"]
    return [
        "train",
        recipe,
        *paths,
        *(text.format(world=world) for text in RECIPES[recipe]),
        *SETTINGS.split(),
    ]


@pytest.fixture(scope="module")
def whole(world, zygote):
    """recipe -> the uninterrupted run's folder and seconds."""
    made = {}

    def get(recipe):
        if recipe not in made:
            out = world / f"{recipe}-whole"
            code, seconds = zygote.run(command(world, recipe, out))
            assert code == 0, zygote.log.read_text()[-2000:]
            made[recipe] = out, seconds
        return made[recipe]

    return get


def outcome(out):
    """What has to be equal to the bit: weights, and every logged figure but the time."""
    rows = [
        {k: v for k, v in row.items() if k != "time"} for row in read_jsonl(out / "metrics.jsonl")
    ]
    return (out / "model" / "model.safetensors").read_bytes(), rows


@pytest.mark.parametrize("repeat", range(REPEATS))
def test_a_killed_run_goes_on_and_ends_the_same(world, zygote, whole, repeat):
    recipe, chance = list(RECIPES)[repeat % len(RECIPES)], random.Random(repeat)
    expected, seconds = whole(recipe)
    out = world / f"{recipe}-{repeat}"
    for _ in range(KILLS):
        code, _ = zygote.run(
            [*command(world, recipe, out), "--resume", "auto"],
            kill_after=chance.uniform(0, seconds),
        )
        assert code in (-9, 0), zygote.log.read_text()[-2000:]
        if code == 0:
            break
        checkpoints = out / "checkpoints"
        tally["kills"] += 1
        tally["kills during a save"] += any(checkpoints.glob(".tmp-step-*"))
        verdicts = checkpoint.verify(checkpoints)
        assert not [v for v in verdicts if v.reason]  # a checkpoint is whole or not there
        tally["restarts from a checkpoint"] += bool(verdicts)
    code, _ = zygote.run([*command(world, recipe, out), "--resume", "auto"])
    assert code == 0, zygote.log.read_text()[-2000:]
    assert outcome(out) == outcome(expected)
    tally["repeats"] += 1
