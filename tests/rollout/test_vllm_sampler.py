"""The vLLM sampler against the real HTTP server on 127.0.0.1, with a transformers model in vLLM's
place (small_server.py).

vLLM itself: test_real_vllm.py, under `make test-vllm`.
"""

import http.client
import threading
import time
from pathlib import Path

import pytest
import torch
from small_server import TransformersEngine, serving
from world import save_model

from alignkit.batches import Draw
from alignkit.config.model import AdapterConfig, ModelConfig, ReferenceConfig
from alignkit.config.rollout import RolloutConfig
from alignkit.errors import ConfigError, ModelError, NumericsError, ResourceError
from alignkit.plan import Plan
from alignkit.policies.load import load_pair
from alignkit.rollout import VLLMSampler
from alignkit.rollout.client import Client
from alignkit.rollout.wire import TOKEN_ENV, version_of

PROMPTS = [torch.tensor(ids) for ids in ([5, 7, 9], [4], [8, 3, 3, 11])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(folder):
    return TransformersEngine(folder)


@pytest.fixture
def url(engine):
    with serving(engine) as address:
        yield address


def pair_of(folder, **fields):
    model = ModelConfig(name_or_path=str(folder), **fields)
    return load_pair(model, ReferenceConfig(), None, Plan("rollout", anchors=()), fixed_data=False)


def sampler_of(pair, url, seed=0, **fields):
    return VLLMSampler(
        pair,
        RolloutConfig(url=url, max_new_tokens=6, start_timeout=5, timeout=5, **fields),
        seed=seed,
    )


def draw(sampler, step=0, n=4, prompts=PROMPTS, ids=range(3)):
    return sampler.sample(prompts, Draw(n), step=step, prompt_ids=ids)


@torch.no_grad()
def worst_difference(pair, drawn):
    """Between the samples' log-probs and those of the policy's own forward pass."""
    worst = 0.0
    for prompt, samples in zip(PROMPTS, drawn, strict=True):
        for sample in samples:
            with pair.model() as model:
                logits = model(torch.cat([prompt, sample.ids])[None]).logits[
                    0, len(prompt) - 1 : -1
                ]
            worst = max(
                worst,
                float(
                    (logits.log_softmax(-1).gather(-1, sample.ids[:, None])[:, 0] - sample.logps)
                    .abs()
                    .max()
                ),
            )
    return worst


def moved(pair, by=0.3):
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.add_(by * torch.randn_like(parameter))


def test_the_server_draws_from_the_weights_that_were_pushed_last(folder, engine, url):
    pair = pair_of(folder)
    sampler = sampler_of(pair, url)
    moved(pair)
    sampler.sync()
    first, version = draw(sampler), sampler.version
    assert worst_difference(pair, first) < 1e-5
    assert all(
        sample.ended == (int(sample.ids[-1]) == 2) for samples in first for sample in samples
    )
    moved(pair)
    assert worst_difference(pair, draw(sampler)) > 0.1  # not yet
    sampler.sync()
    assert worst_difference(pair, draw(sampler)) < 1e-5
    other = pair_of(folder)
    moved(other)
    same = sampler_of(other, url)
    same.sync()
    # the weights give it its name, not their history
    assert sampler.version != version == same.version


def test_an_adapter_is_folded_in_and_the_policy_stays_as_it_is(folder, url):
    pair = pair_of(folder, adapter=AdapterConfig(r=4, alpha=8))
    moved(pair)
    before = {name: value.clone() for name, value in pair.base.state_dict().items()}
    sampler = sampler_of(pair, url)
    sampler.sync()
    assert worst_difference(pair, draw(sampler)) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in pair.base.state_dict().items())


def test_tied_weights_are_sent_once_and_in_the_servers_dtype(folder, tmp_path):
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from alignkit.policies.export import write_weights

    shape = {
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    found = load_file(write_weights(model, tmp_path, dtype=torch.bfloat16))
    assert "lm_head.weight" not in found
    assert torch.equal(found["model.embed_tokens.weight"], model.lm_head.weight.bfloat16())
    assert {value.dtype for value in found.values()} == {torch.bfloat16}


def test_a_completion_has_a_seed_of_its_own(folder, url):
    """It depends on (seed, step, prompt id, completion), not on what else is asked for: a resumed
    run draws the same.
    """
    pair = pair_of(folder)
    sampler = sampler_of(pair, url)
    sampler.sync()

    def texts(drawn):
        return [[s.ids.tolist() for s in samples] for samples in drawn]

    once = texts(draw(sampler))
    assert texts(draw(sampler)) == once
    assert texts(draw(sampler, n=2, prompts=PROMPTS[1:], ids=[1, 2])) == [
        row[:2] for row in once[1:]
    ]
    assert texts(draw(sampler, step=1)) != once
    again = sampler_of(pair, url, seed=1)
    again.sync()
    assert texts(draw(again)) != once
    assert len({tuple(row) for row in once[0]}) > 1


def test_weights_of_someone_else_are_noticed(folder, engine, url):
    pair, other = pair_of(folder), pair_of(folder)
    sampler, thief = sampler_of(pair, url), sampler_of(other, url)
    sampler.sync()
    moved(other)
    thief.sync()
    with pytest.raises(
        ResourceError,
        match=r"stale weights: the server at http://127\.0.* has others than this run gave it",
    ):
        draw(sampler)
    sampler.sync()  # the version has not moved, but the server's has


def test_an_answer_that_names_other_weights_is_no_data(folder, engine, url):
    sampler = sampler_of(pair_of(folder), url)
    sampler.sync()
    answered = sampler.client.sample
    sampler.client.sample = lambda asked, most: {**answered(asked, most), "version": "older"}
    with pytest.raises(ResourceError, match="sampled with stale weights: older, not"):
        draw(sampler)


def test_weights_are_sent_again_to_a_server_that_lost_them(folder, engine):
    pair = pair_of(folder)
    moved(pair)
    with serving(engine) as url:
        sampler = sampler_of(pair, url)
        sampler.sync()
        port = int(url.rpartition(":")[2])
    with serving(TransformersEngine(folder), port) as url:
        sampler.sync()
        assert worst_difference(pair, draw(sampler)) < 1e-5


def test_a_process_that_does_not_push_takes_the_version_of_its_server(folder, engine, url):
    """Two ranks with one server: requests that wait for the engine together run as one batch."""
    pushing = sampler_of(pair_of(folder), url)
    config = RolloutConfig(url=url, max_new_tokens=6)
    other = VLLMSampler(pair_of(folder), config, seed=0, pushes=False)
    pushing.sync()
    other.sync()
    draw(other)
    assert other.version == pushing.version != ""
    quick, engine.batches = engine.continuations, []
    engine.continuations = lambda rows: (time.sleep(0.1), quick(rows))[1]
    threads = [threading.Thread(target=draw, args=(s,)) for s in (pushing, other, pushing)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    assert engine.batches == [12, 24]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda row: {**row, "ids": row["ids"][:-1]},
            "completions.0: Value error, as many log-probs as tokens",
        ),
        (
            lambda row: {**row, "ids": ["5"] * len(row["ids"])},
            "malformed answer at completions.0.ids.0",
        ),
        (
            lambda row: {**row, "ids": [-1] * len(row["ids"])},
            "malformed answer at completions.0.ids.0",
        ),
        (
            lambda row: {"ids": [], "logps": [], "ended": True},
            "malformed answer at completions.0.ids",
        ),
        (
            lambda row: {"ids": [23], "logps": [-1.0], "ended": True},
            "the 12 completions .* of at most 6 tokens below 23",
        ),
        (
            lambda row: {"ids": [5] * 7, "logps": [-1.0] * 7, "ended": True},
            "did not give the 12 completions",
        ),
        (
            lambda row: {"ids": [5], "logps": [None], "ended": True},
            "malformed answer at completions.0.logps.0",
        ),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_no_data(folder, engine, url, change, words):
    sampler, true = sampler_of(pair_of(folder), url), engine.continuations
    engine.continuations = lambda rows: [change(row) for row in true(rows)]
    sampler.sync()
    with pytest.raises(ResourceError, match=words):
        draw(sampler)


def test_log_probs_that_are_not_finite_are_a_numerical_stop(folder, engine, url):
    sampler = sampler_of(pair_of(folder), url)
    engine.continuations = lambda rows: (
        [{"ids": [5], "logps": [float("nan")], "ended": False}] * len(rows)
    )
    sampler.sync()
    with pytest.raises(NumericsError, match="not finite"):
        draw(sampler)


def test_a_server_that_hangs_breaks_or_is_gone(folder, engine):
    with serving(engine) as url:
        sampler = sampler_of(pair_of(folder), url)
        sampler.sync()
        sampler.client.timeout = 0.2
        engine.continuations = lambda rows: time.sleep(0.3) or []
        with pytest.raises(
            ResourceError,
            match=r"did not answer in 0\.2 s; start it again, then go on with --resume auto",
        ):
            draw(sampler)
        sampler.client.timeout = 5
        engine.sample = lambda rows: 1 / 0
        with pytest.raises(
            ResourceError, match="answered POST /sample with 500: ZeroDivisionError"
        ):
            draw(sampler)
    with pytest.raises(
        ResourceError, match=r"no sampling server answers at http://127\.0.*Connection"
    ):
        draw(sampler)


def test_a_server_that_is_still_starting_is_waited_for(folder, engine, caplog, monkeypatch):
    monkeypatch.setattr("alignkit.rollout.client.WARN_EVERY", 0.1)
    with serving(engine) as url:
        port = int(url.rpartition(":")[2])
    with pytest.raises(
        ResourceError, match=r"within rollout.start_timeout \(0.3 s\); start one with `python -m"
    ):
        Client(url, timeout=1).wait(0.3)
    assert "of 0.3 s" in caplog.text
    found = []
    thread = threading.Thread(target=lambda: found.append(Client(url, timeout=1).wait(5)))
    thread.start()
    time.sleep(0.2)
    with serving(engine, port):
        thread.join()
    assert found[0]["engine"] == "transformers"


def test_another_model_is_refused(folder, engine, url):
    pair = pair_of(folder)
    told = engine.describe()
    for change, words in [
        ({"vocabulary": "0"}, "whose tokenizer is not the policy's"),
        (
            {"shape": {**told["shape"], "hidden_size": 32}},
            r"another architecture \(hidden_size 32 for 16\)",
        ),
        ({"dtype": "int8"}, "in int8; allowed: float32"),
    ]:
        engine.describe = lambda change=change: {**told, **change}
        with serving(engine) as other, pytest.raises(ModelError, match=words):
            sampler_of(pair, other)
    engine.load = lambda folder: (_ for _ in ()).throw(KeyError("no such layer"))
    sampler = sampler_of(pair, url)
    with pytest.raises(
        ModelError,
        match="refused the policy's weights: the weights do not fit this model: 'no such layer'",
    ):
        sampler.sync()
    with pytest.raises(ResourceError, match="stale weights"):
        draw(sampler)


def test_the_context_of_the_server_is_a_limit(folder, engine, url):
    sampler = sampler_of(pair_of(folder), url)
    sampler.about["max_length"] = 9
    with pytest.raises(
        ConfigError, match="a prompt leaves room for 5 of 6 tokens in the server's 9"
    ):
        draw(sampler)


def test_the_token_is_asked_for(folder, engine, monkeypatch):
    with serving(engine, token="s3cret") as url:
        for value in ("", "wrong"):
            monkeypatch.setenv(TOKEN_ENV, value)
            with pytest.raises(ResourceError, match="401: the token is missing or wrong"):
                Client(url, timeout=1).wait(5)
        monkeypatch.setenv(TOKEN_ENV, "s3cret")
        assert Client(url, timeout=1).hello()["protocol"] == 1
    monkeypatch.delenv(TOKEN_ENV)
    with pytest.raises(ConfigError, match=f"is not this machine; set {TOKEN_ENV}"):
        Client("https://gpu.example:8001", timeout=1)


def test_what_the_server_refuses(url, tmp_path):
    def ask(method, path, body=b"", **headers):
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=2)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode()

    json = {"Content-Type": "application/json"}
    # all that another site's page can send
    assert ask("POST", "/sample", b"{}", **{"Content-Type": "text/plain"})[0] == 415
    assert ask("POST", "/sample", b"{}", **json) == (
        400,
        '{"error": "malformed request: KeyError: \'max_new_tokens\'"}',
    )
    assert ask("POST", "/sample", b"[", **json)[0] == 400
    assert ask("GET", "/weights")[0] == 404
    assert ask("PUT", "/weights", b"abc", **{"X-Alignkit-Version": "0"}) == (
        400,
        '{"error": "the weights arrived damaged: their SHA-256 is not the announced version"}',
    )
    file = Path(tmp_path / "model.safetensors")
    file.write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="do not fit this model"):
        Client(url, timeout=2).push(file, version_of(file))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"url": "http://10.0.0.3:8001"}, "http would send weights to 10.0.0.3 in the clear"),
        ({"url": "http://example.com"}, "in the clear"),
        ({"url": "ftp://127.0.0.1"}, "write http://127.0.0.1:PORT"),
        ({"url": "http://127.0.0.1:8001/v1"}, "write http://127.0.0.1:PORT"),
        ({"url": "http://me:pw@127.0.0.1"}, "write http://127.0.0.1:PORT"),
        ({"url": "http://127.0.0.1:port"}, "port"),
        ({"engine": "vllm"}, "engine vllm needs a url"),
        ({"engine": "hf", "url": "http://127.0.0.1"}, "the engine is hf"),
        ({"url": "http://127.0.0.1", "max_importance": 0.5}, "max_importance"),
    ],
)
def test_the_section_refuses(fields, words):
    with pytest.raises(ValueError, match=words):
        RolloutConfig(**fields)


def test_the_engine_follows_from_the_url():
    assert RolloutConfig().engine == "hf"
    for url in (
        "http://127.0.0.1:8001",
        "http://localhost:1",
        "http://[::1]:8001",
        "https://gpu.example",
    ):
        assert RolloutConfig(url=url).engine == "vllm"
