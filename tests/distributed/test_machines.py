"""Several machines: what `--machines` means, the texts of `docs/scale.md`, and a job that goes on when
one of its machines dies.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import yaml
from world import pair_rows, run, save_model, write_rows

from alignkit.cli.main import app
from alignkit.distributed.launcher import Machines, machines_of
from alignkit.errors import ConfigError
from alignkit.files import read_jsonl

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_what_the_options_mean():
    assert machines_of("1", None) is None
    assert machines_of("8", "node0:29500") == Machines(8, 8, "node0:29500")
    assert machines_of("4:8", "[::1]:29500") == Machines(4, 8, "[::1]:29500")


@pytest.mark.parametrize(
    ("given", "first", "words"),
    [
        ("four", "a:1", "give a number such as 8"),
        ("0", "a:1", "give a number such as 8"),
        ("8:4", "a:1", "from few to many"),
        ("8", None, "the machines meet at the first one"),
        ("8", "node0", "such as --first node0:29500"),
    ],
)
def test_machines_that_cannot_meet_are_refused(given, first, words):
    with pytest.raises(ConfigError, match=words):
        machines_of(given, first)


def test_the_refusal_reaches_the_command_line(capsys, tmp_path):
    assert run("train", "dpo", "--machines", "8", f"output_dir={tmp_path}/run") == 2
    assert "--machines 8: the machines meet at the first one" in capsys.readouterr().err


def options_of(line):
    return set(re.findall(r"(--[a-z-]+)", line.partition("alignkit train")[2]))


def known_options():
    import typer.main

    train = typer.main.get_command(app).commands["train"]
    return {option for parameter in train.params for option in parameter.opts}


def test_the_slurm_file_is_one():
    (script,) = [text for text in blocks("bash") if "#SBATCH" in text]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    settings = dict(re.findall(r"#SBATCH --([a-z-]+)=(\S+)", script))
    assert settings["ntasks-per-node"] == "1"
    assert settings["nodes"] in script.partition("--machines ")[2][:4]
    command = script.replace("\\\n", " ").partition("srun")[2]
    assert options_of(command) <= known_options()
    assert "--machines" in options_of(command)


def test_the_kubernetes_job_is_one():
    (text,) = blocks("yaml")
    service, job = yaml.safe_load_all(text)
    spec = job["spec"]
    pod = spec["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 8
    assert service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"]
    command = " ".join(pod["containers"][0]["command"])
    assert options_of(command) <= known_options()
    first = re.search(r"--first=(\S+):29500", command)[1]
    assert first == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["terminationGracePeriodSeconds"] >= 300


@pytest.mark.long
def test_a_job_goes_on_with_the_machines_that_are_left(tmp_path):
    """Two machines with a process each; the second dies. The first one starts again alone and comes
    to the weights' losses of an uninterrupted run: the order of the data is that of one process.
    """
    model = save_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(12))
    settings = [
        f"model.name_or_path={model}",
        f"data.train={rows}",
        "train.batch_size=4",
        "train.steps=120",
        "train.save_every=5",
        "train.eval_every=0",
        "train.log_samples_every=0",
    ]
    assert run("train", "dpo", *settings, f"output_dir={tmp_path}/whole") == 0

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = tmp_path / "job"
    machines = ["--machines", "1:2", "--first", f"127.0.0.1:{port}"]
    command = [sys.executable, "-m", "alignkit", "train", "dpo", *settings, f"output_dir={out}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

    with ExitStack() as stack:
        jobs = []
        for _ in range(2):
            job = subprocess.Popen(
                [*command, *machines],
                env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            jobs.append(job)
            stack.callback(end, job)
            time.sleep(3)
        first, second = jobs
        while first.poll() is None and len(read_jsonl(out / "metrics.jsonl")) < 20:
            time.sleep(0.05)
        end(second)
        _, said = first.communicate(timeout=240)
    assert first.returncode == 0, said[-3000:]

    losses = [
        [row["loss"] for row in read_jsonl(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "job")
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def end(job):
    """Kill a process and all that it started."""
    for child in children(job.pid):
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()


def children(pid):
    """The processes below one, whatever their groups are."""
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    if not tasks.exists():
        return []
    direct = [int(child) for child in tasks.read_text().split()]
    return [*direct, *(grandchild for child in direct for grandchild in children(child))]
