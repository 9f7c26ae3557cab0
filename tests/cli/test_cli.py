"""The command line: speed of its help, one test per exit code, and what a run leaves on disk."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from world import pair_rows, run, save_model, write_rows

from alignkit.cli.main import main
from alignkit.config.recipe import load_recipe, shipped_recipes
from alignkit.files import read_jsonl
from alignkit.training.ownership import MARK

COMMANDS = [
    "",
    "train",
    "plan",
    "compare",
    "eval",
    "verify",
    "generate",
    "merge",
    "recipes",
    "data",
    "data check",
    "checkpoint verify",
]


def cpu_seconds(*command):
    """Output and CPU time of a child: what a command costs, whatever else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_importing_takes_no_time():
    done, seconds = cpu_seconds(
        "-c",
        "import alignkit, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])",
    )
    assert done.stdout == "[]\n"
    assert seconds < 0.3


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_at_once(command):
    done, seconds = cpu_seconds("-m", "alignkit", *command.split(), "--help")
    assert done.returncode == 0
    assert "Usage: " in done.stdout
    assert seconds < 1


def test_exit_2_config_comes_at_once(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("train:\n  stepz: 3\n")
    done, seconds = cpu_seconds("-X", "importtime", "-m", "alignkit", "train", str(recipe))
    assert done.returncode == 2
    *imports, message = done.stderr.splitlines()
    assert message.startswith(
        f"alignkit: {recipe}:2: `train.stepz` is not a field of `train`. Did you mean `steps`?"
    )
    assert not [
        line
        for line in imports
        if line.split("|")[-1].strip() in ("torch", "transformers", "datasets")
    ]
    assert seconds < 1


def test_exit_3_data_comes_at_once(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": ["c"]}\n')
    done, seconds = cpu_seconds(
        "-m", "alignkit", "data", "check", str(tmp_path / "pairs.jsonl"), "data.format=pair"
    )
    assert done.returncode == 3
    assert "1 of 1 rows are malformed" in done.stderr
    assert seconds < 1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a tiny model, pairs, and objectives of a user's own."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    write_rows(folder / "pairs.jsonl", pair_rows(6))
    (folder / "my_losses.py").write_text(
        "import os\nfrom alignkit import DPO\n\n"
        "class Signals(DPO):\n"
        '    """Sends this process a signal once, in the third step."""\n'
        "    signum: int\n    flag: str\n\n"
        "    def loss(self, batch):\n"
        "        calls = len(open(self.flag).read()) if os.path.exists(self.flag) else 0\n"
        "        open(self.flag, 'a').write('.')\n"
        "        if calls == 2:\n            os.kill(os.getpid(), self.signum)\n"
        "        return super().loss(batch)\n"
    )
    return folder


def options(world, out):
    settings = "train.steps=5 train.batch_size=4 train.warmup_steps=0 train.eval_every=0 train.log_samples_every=0"
    return [
        f"model.name_or_path={world / 'model'}",
        f"data.train={world / 'pairs.jsonl'}",
        f"output_dir={out}",
        *settings.split(),
    ]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "dpo"
    assert (
        run("train", "dpo", *options(world, out), "train.save_every=2", "train.log_samples_every=3")
        == 0
    )
    return out


def test_exit_0_a_run_leaves_its_folder(finished):
    assert sorted(p.name for p in finished.iterdir() if not p.name.startswith(".")) == [
        "README.md", "checkpoints", "metrics.jsonl", "model", "recipe.yaml", "samples.jsonl",
    ]  # fmt: skip
    assert [row["step"] for row in read_jsonl(finished / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert {row["step"] for row in read_jsonl(finished / "samples.jsonl")} == {0, 3, 5}
    assert "-log sigmoid" in (finished / "README.md").read_text()


def test_the_resolved_recipe_is_kept_and_reads_back(finished):
    kept = load_recipe(finished / "recipe.yaml")
    assert (kept.model.dtype, kept.model.layout, kept.reference.kind) == (
        "float32",
        "shared_prefix",
        "cached",
    )
    assert (kept.data.format, kept.train.dtype, kept.train.micro_batch_tokens) == (
        "pair",
        "float32",
        4096,
    )
    assert Path(kept.output_dir) == finished
    assert "auto" not in {
        v
        for s in (kept.model, kept.reference, kept.train, kept.rollout)
        for v in s.model_dump().values()
        if v
    }


def test_a_finished_run_is_not_repeated(world, finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert (
        run("train", "dpo", *options(world, finished), "train.save_every=2", "--resume", "auto")
        == 0
    )
    said = capsys.readouterr()
    assert "is finished" in said.err
    assert said.out.startswith("5 steps done; the model is in ")
    assert run("train", "dpo", *options(world, finished)) == 2
    assert "already holds a run; continue it with --resume auto" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_what_is_done_with_a_finished_run(finished, capsys):
    assert (
        run(
            "generate",
            finished,
            "w3 w4",
            "--completions",
            "2",
            "--max-new-tokens",
            "3",
            "--seed",
            "1",
        )
        == 0
    )
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert run("checkpoint", "list", finished) == 0
    assert capsys.readouterr().out == "".join(
        f"{finished}/checkpoints/step-{n}  whole\n" for n in (2, 4)
    )


def test_exit_4_model(world, tmp_path, capsys):
    assert run("generate", tmp_path, "w3") == 4
    assert "holds no config.json" in capsys.readouterr().err
    assert run("merge", world / "model") == 4
    assert "only LoRA runs need merging" in capsys.readouterr().err


def test_exit_5_numerical_stop(world, tmp_path, capsys):
    assert (
        run(
            "train",
            "dpo",
            *options(world, tmp_path / "out"),
            "train.learning_rate=1e30",
            "train.max_grad_norm=0",
        )
        == 5
    )
    assert "train.learning_rate" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model").exists()


def test_exit_6_checkpoint(finished, world, tmp_path, capsys):
    assert run("checkpoint", "list", world) == 6
    assert "holds no checkpoints" in capsys.readouterr().err
    broken = tmp_path / "broken"
    (broken / "checkpoints" / "step-2").mkdir(parents=True)
    (broken / MARK).write_text('{"alignkit": "0"}')
    assert run("checkpoint", "verify", broken) == 6
    assert "manifest.json is missing" in capsys.readouterr().out
    assert run("train", "dpo", *options(world, broken), "--resume", "auto") == 6
    assert "no valid checkpoint" in capsys.readouterr().err


def test_exit_7_resources(world, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("train", "dpo", *options(world, tmp_path / "file" / "out")) == 7
    assert "choose another output_dir" in capsys.readouterr().err


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_130_and_143_a_signal_leaves_a_checkpoint_to_go_on_from(
    world, tmp_path, capsys, monkeypatch, signum, code
):
    monkeypatch.chdir(world)

    def arguments(name):
        objective = f"objective={{import: 'my_losses:Signals', signum: {int(signum)}, flag: {tmp_path / name}.flag}}"
        return ["train", "dpo", *options(world, tmp_path / name), "train.save_every=0", objective]

    assert run(*arguments("run")) == code
    assert "after step 3; go on with --resume auto" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-3"]
    # another run's checkpoint
    assert run(*arguments("run"), "train.learning_rate=1", "--resume", "auto") == 6
    assert "train.learning_rate: 0.0005 -> 1" in capsys.readouterr().err
    assert run(*arguments("run"), "train.save_every=4", "--resume", "auto") == 0
    (tmp_path / "whole.flag").write_text("...")  # never sends its signal
    assert run(*arguments("whole")) == 0
    resumed, whole = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole")
    )
    assert all((resumed[name] == whole[name]).all() for name in whole)


def test_safe_runs_no_code_of_the_recipe(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(world)
    imported = "objective={import: 'my_losses:Signals', signum: 2, flag: x}"
    assert run("train", "dpo", *options(world, tmp_path / "out"), imported, "--safe") == 2
    assert "--safe does not allow that" in capsys.readouterr().err
    assert (
        run(
            "train",
            "dpo",
            *options(world, tmp_path / "out"),
            "model.trust_remote_code=true",
            "--safe",
        )
        == 2
    )
    assert "--safe forbids it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ["train", "dpo", "data.train=task:revews"],
            2,
            "there is no task `revews`. Did you mean `reviews`?",
        ),
        (
            ["train", "dpo", "data.train=task:reviews", "data.eval=task:reviews_small"],
            2,
            "name two tasks",
        ),
        (
            ["train", "dpo", "data.train=nowhere.jsonl"],
            3,
            "there is no file or folder nowhere.jsonl",
        ),
        (
            ["train", "dpo", "objective.beta=0"],
            2,
            "`objective.beta` is 0; it should be greater than 0",
        ),
        (["train", "dpo", "--betas=1"], 2, "No such option: --betas"),
        (["train", "dpo", "--processes", "0"], 2, "greater than or equal to 1"),
        (["trian"], 2, "No such command"),
        (["compare", "dpo"], 2, "has no `compare` section; see"),
        (["eval", "runs/dpo"], 2, "there is no run folder runs/dpo"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(
    arguments, code, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == code
    assert words in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_recipes_are_listed_shown_and_copied(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("recipes", "list") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(
        shipped_recipes()
    )
    assert run("recipes", "show", "ipo", "train.steps=7") == 0
    Path("shown.yaml").write_text(capsys.readouterr().out)
    assert load_recipe("shown.yaml").train.steps == 7
    assert run("recipes", "copy", "ipo") == 0
    assert Path("ipo.yaml").read_text() == shipped_recipes()["ipo"].read_text()
    assert run("recipes", "copy", "ipo") == 2
    assert "ipo.yaml exists already" in capsys.readouterr().err


def test_other_exceptions_keep_their_traceback(tmp_path, world, monkeypatch):
    monkeypatch.chdir(world)
    (tmp_path / "bad.py").write_text("raise ZeroDivisionError('mine')\nX = 1\n")
    with pytest.raises(ZeroDivisionError, match="mine"):
        main(
            [
                "train",
                "dpo",
                *options(world, tmp_path / "out"),
                f"objective={{import: '{tmp_path / 'bad.py'}:X'}}",
            ]
        )


def test_several_processes_give_the_exit_code_of_the_first_that_fails(caplog):
    from alignkit.distributed.launcher import launch

    assert launch(2, ["recipes", "show", "nope"]) == 2
    assert "ended with exit code 2" in caplog.text


def test_a_signal_ends_several_processes_with_its_code(tmp_path, monkeypatch):
    """In place of runs, two sleepers; a thread sends this process, which supervises them, the
    signal once they are there.
    """
    from alignkit.distributed.launcher import launch

    sleeper = tmp_path / "sleeper"
    sleeper.write_text('#!/bin/sh\ntouch "$0.$RANK"\nexec sleep 60\n')
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))

    def stop():
        while len(list(tmp_path.glob("sleeper.*"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    }
    threading.Thread(target=stop, daemon=True).start()
    try:
        assert launch(2, []) == 128 + signal.SIGTERM
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
