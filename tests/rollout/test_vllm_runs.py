"""Whole runs on a sampling server with vLLM's paths (a transformers model in vLLM's place; see
small_server.py).
"""

import json
import threading

import pytest
from safetensors.torch import load_file
from small_server import TransformersEngine, serving
from world import run, save_model

from alignkit.files import read_jsonl

WORDS = "def wanted(prompts, completions, **columns): return [c.split().count('w5') / 6 for c in completions]\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    (folder / "mine.py").write_text(WORDS)
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"w{3 + n}"}) + "\n" for n in range(8))
    )
    return folder


@pytest.fixture
def train(world, capsys):
    """Exit code and stderr of a run with `rloo`, 4 prompts a step and 4 completions each."""

    def call(out, url, *overrides, objective="rloo", model=None):
        settings = "train.batch_size=4 train.warmup_steps=0 train.log_samples_every=0 train.learning_rate=1e-2 train.save_every=2"
        fields = [
            f"model.name_or_path={model or world / 'model'}",
            f"data.train={world / 'prompts.jsonl'}",
            f"rewards=[{{function: '{world / 'mine.py'}:wanted'}}]",
            f"rollout={{url: {url}, max_new_tokens: 6, completions: 4, timeout: 60, start_timeout: 60}}",
            f"output_dir={out}",
            *settings.split(),
        ]
        code = run("train", objective, *fields, *overrides)
        return code, " ".join(capsys.readouterr().err.split())

    return call


def test_a_run_learns_and_tells_the_mismatch(world, train, tmp_path):
    engine = TransformersEngine(world / "model")
    with serving(engine) as url:
        assert (
            train(
                tmp_path / "run",
                url,
                "train.steps=15",
                "train.save_every=0",
                "train.learning_rate=3e-2",
                "train.ema_decay=0",
                "objective.beta=0.01",
            )[0]
            == 0
        )
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert sum(row["reward"] for row in rows[-5:]) > sum(row["reward"] for row in rows[:5]) + 1
    for row in rows:
        assert 0 <= row["sampling/mismatch_kl"] < 1e-9
        assert 0 < row["sampling/logp_difference_max"] < 1e-4
        assert row["sampling/importance_mean"] == pytest.approx(1, abs=1e-4)
        assert row["sampling/importance_capped"] == 0
        assert row["importance"] == pytest.approx(1, abs=1e-5)
    final, served = (
        load_file(tmp_path / "run" / "model" / "model.safetensors"),
        engine.model.state_dict(),
    )
    # one update behind
    assert 0 < max(float((served[name] - value).abs().max()) for name, value in final.items()) < 0.1


def test_a_killed_server_stops_the_run_which_goes_on_with_another(world, train, tmp_path):
    """2 epochs over each rollout, saved in the middle of one: the resumed run is the uninterrupted
    run, bit for bit.
    """
    settings = (
        "train.steps=8",
        "objective={name: grpo, beta: 0.1, epochs: 2}",
        "train.save_every=3",
    )
    with serving(TransformersEngine(world / "model")) as url:
        assert train(tmp_path / "whole", url, *settings)[0] == 0
    engine = TransformersEngine(world / "model")
    with serving(engine) as url:
        load = engine.load

        def dying(folder):
            load(folder)
            loads.append(folder)
            if len(loads) == 3:  # at step 5 of 8
                engine.stop()

        loads, engine.load = [], dying
        code, err = train(tmp_path / "broken", url, *settings)
    assert code == 7
    assert f"step 5: rollout.url: no sampling server answers at {url}" in err
    assert err.endswith("The last good checkpoint is step-3; --resume auto goes on from it")
    with serving(TransformersEngine(world / "model")) as url:
        assert train(tmp_path / "broken", url, *settings, "--resume", "auto")[0] == 0
    whole, resumed = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "broken")
    )
    assert all((resumed[name] == value).all() for name, value in whole.items())
    rewards = [
        [row["reward"] for row in read_jsonl(tmp_path / name / "metrics.jsonl")[4:]]
        for name in ("whole", "broken")
    ]
    assert rewards[0] == rewards[1]


def test_a_server_that_is_a_little_off_is_corrected_for(world, train, tmp_path):
    """It samples at temperature 0.9, and says so in its log-probs: the objective sees the
    trainer's, and weights beside them.
    """
    engine = TransformersEngine(world / "model")
    true = engine.sample
    engine.sample = lambda prompt, **fields: true(prompt, **{**fields, "temperature": 0.9})
    with serving(engine) as url:
        assert train(tmp_path / "run", url, "train.steps=2", "rollout.max_importance=1.5")[0] == 0
    for row in read_jsonl(tmp_path / "run" / "metrics.jsonl"):
        assert row["sampling/mismatch_kl"] > 1e-3
        # of the policy over the trainer's log-probs: no update yet
        assert row["importance"] == pytest.approx(1, abs=1e-5)
        assert 0.8 < row["sampling/importance_mean"] < 1.1
        assert row["sampling/importance_mean"] != pytest.approx(1, abs=1e-3)


def test_a_server_that_computes_another_model_is_found_out(world, train, tmp_path):
    engine = TransformersEngine(world / "model")
    engine.load = lambda folder: None  # says that it took the weights
    with serving(engine) as url:
        code, err = train(tmp_path / "run", url, "train.steps=20", "train.learning_rate=0.3")
    assert code == 7
    assert "nats per token from the trainer's, more than rollout.max_mismatch 0.1" in err


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("nash_md", "vllm cannot sample the token-level mixture of policy and reference"),
        ("ipo_md", "vllm cannot sample the token-level mixture of policy and reference"),
        ("xpo", "this objective draws from its `reference`"),
        ("inpo", "this objective draws from its `target`"),
        ("hypo", "vllm does not sample beside fixed data"),
    ],
)
def test_what_the_server_cannot_draw_is_refused_before_models_load(
    train, tmp_path, objective, words
):
    (tmp_path / "config.json").write_text("{}")  # a model that cannot be loaded
    rows = tmp_path / "pairs.jsonl"  # right for objectives with fixed data as well
    rows.write_text('{"prompt": "1", "chosen": "2", "rejected": "3"}\n')
    code, err = train(
        tmp_path / "run",
        "http://127.0.0.1:9",
        f"data.train={rows}",
        objective=objective,
        model=tmp_path,
    )
    assert (code, words in err) == (2, True), err
    assert "override `rollout=" in err


def test_a_server_elsewhere_needs_https_and_a_token(train, tmp_path, monkeypatch):
    monkeypatch.delenv("ALIGNKIT_ROLLOUT_TOKEN", raising=False)
    (tmp_path / "config.json").write_text("{}")  # a model that cannot be loaded
    code, err = train(tmp_path / "run", "https://gpu.example:8001", model=tmp_path)
    assert (code, "set ALIGNKIT_ROLLOUT_TOKEN to the server's token" in err) == (2, True), err
    code, err = train(tmp_path / "run", "http://gpu.example:8001", model=tmp_path)
    assert (code, "http would send weights to gpu.example in the clear" in err) == (2, True), err


def test_no_server(world, train, tmp_path):
    code, err = train(tmp_path / "run", "http://127.0.0.1:9", "rollout.start_timeout=0.2")
    assert (code, "within rollout.start_timeout (0.2 s)" in err) == (7, True), err


def test_a_server_that_cannot_be_started(train, tmp_path):
    code, err = train(tmp_path / "run", "null", "rollout.colocate=true", "rollout.program=no-vllm")
    assert (code, "rollout.colocate: there is no program no-vllm" in err) == (2, True), err


def test_a_run_with_two_servers_outlives_one_of_them(world, train, tmp_path):
    engines = [TransformersEngine(world / "model"), TransformersEngine(world / "model")]
    with serving(engines[0]) as first, serving(engines[1]) as second:
        load, loads = engines[0].load, []

        def dying(folder):
            load(folder)
            loads.append(folder)
            if len(loads) == 3:
                threading.Thread(target=engines[0].stop).start()

        engines[0].load = dying
        assert train(tmp_path / "run", f"[{first}, {second}]", "train.steps=5")[0] == 0
    assert len(loads) == 3
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["sampling/mixed_versions"] for row in rows] == [0.0] * 5
    assert all(row["sampling/mismatch_kl"] < 1e-9 for row in rows)
