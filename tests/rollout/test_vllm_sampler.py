"""The vLLM sampler against servers on 127.0.0.1 with vLLM's paths and a transformers model in vLLM's
place (small_server.py).

vLLM itself: test_real_vllm.py, under `make test-vllm`.
"""

import threading
import time

import pytest
import torch
from small_server import TransformersEngine, serving
from transformers import AutoConfig
from world import save_model

from alignkit.batches import Draw
from alignkit.config.model import AdapterConfig, ModelConfig, ReferenceConfig
from alignkit.config.rollout import RolloutConfig
from alignkit.errors import ConfigError, ModelError, NumericsError, ResourceError
from alignkit.plan import Plan
from alignkit.policies.load import load_pair
from alignkit.rollout import VLLMSampler
from alignkit.rollout.client import TOKEN_ENV, Client

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
    fields = {"max_new_tokens": 6, "start_timeout": 60, "timeout": 60, **fields}
    return VLLMSampler(pair, RolloutConfig(url=url, **fields), seed=seed)


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
    # updates are numbered, and named after the weights
    assert version.partition(":")[0] == "1"
    assert sampler.version.partition(":")[0] == "2"
    assert same.version == version != sampler.version


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

    from alignkit.policies.weight_stream import WeightStream, write_weights

    shape = {
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    write_weights(WeightStream(model, torch.bfloat16), tmp_path)
    found = load_file(tmp_path / "model.safetensors")
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
    draw(sampler)


def test_a_completion_of_two_versions_is_counted(folder, engine, url):
    sampler = sampler_of(pair_of(folder), url)
    sampler.sync()
    choices = engine.choices

    def with_an_older_start(asked):
        answer = choices(asked)
        answer[0]["weight_versions"].insert(0, {"version": "0:older", "start": 0, "end": 1})
        return answer

    engine.choices = with_an_older_start
    assert [[sample.mixed for sample in row] for row in draw(sampler)] == [[True] + [False] * 3] * 3


def test_new_weights_are_in_force_only_when_all_of_them_are_there(folder, engine, url):
    sampler = sampler_of(pair_of(folder), url)
    engine.calls.clear()
    sampler.sync()
    rename = "/update_weight_version"
    order = ["/pause", rename, "/collective_rpc", "/reset_prefix_cache", rename, "/resume"]
    assert engine.calls == ["/weight_info", "/weight_info", *order]
    engine.calls.clear()
    sampler.sync()  # the same weights are not sent again
    assert "/collective_rpc" not in engine.calls


@pytest.fixture
def two(folder):
    engines = [TransformersEngine(folder), TransformersEngine(folder)]
    with serving(engines[0]) as first, serving(engines[1]) as second:
        yield engines, [first, second]


def test_two_servers_share_the_prompts_and_both_get_the_weights(folder, two):
    engines, urls = two
    pair = pair_of(folder)
    moved(pair)
    sampler = sampler_of(pair, urls)
    sampler.sync()
    drawn = sampler.sample(PROMPTS * 4, Draw(2), step=0, prompt_ids=range(12))
    assert worst_difference(pair, drawn[:3]) < 1e-5
    assert min(engine.prompts for engine in engines) >= 3
    assert sum(engine.prompts for engine in engines) == 12  # a prompt's group stays together

    alone = sampler_of(pair, urls[0])
    alone.sync()
    again = alone.sample(PROMPTS * 4, Draw(2), step=0, prompt_ids=range(12))
    assert [[s.ids.tolist() for s in row] for row in again] == [
        [s.ids.tolist() for s in row] for row in drawn
    ]


def test_the_others_take_over_what_a_dead_server_had(folder, two, caplog):
    engines, urls = two
    sampler = sampler_of(pair_of(folder), urls)
    sampler.sync()
    sample = engines[0].sample

    def dying(*arguments, **fields):
        threading.Thread(target=engines[0].stop).start()
        raise ConnectionAbortedError

    engines[0].sample = dying
    drawn = draw(sampler, prompts=PROMPTS * 4, ids=range(12))
    assert [len(row) for row in drawn] == [4] * 12
    assert engines[1].prompts == 12
    assert "1 other servers take over its work" in caplog.text

    engines[0].sample = sample
    with serving(engines[0], int(urls[0].rpartition(":")[2])):
        sampler.sync()  # it is back, and gets the weights
        draw(sampler, prompts=PROMPTS * 4, ids=range(12))
    assert engines[0].prompts > 0


def test_a_server_that_was_started_again_has_lost_its_place(folder, two):
    engines, urls = two
    sampler = sampler_of(pair_of(folder), urls)
    sampler.sync()
    engines[0].version = "default"
    assert len(draw(sampler)) == 3
    assert engines[1].prompts == 3
    engines[1].version = "default"
    with pytest.raises(ResourceError, match=r"stale weights.*\(default, not 1:"):
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


def test_a_transfer_that_breaks_in_the_middle_is_no_version_and_is_made_again(folder, engine, url):
    pair = pair_of(folder)
    moved(pair)
    sampler, load = sampler_of(pair, url), engine.load

    def breaking(folder):
        with torch.no_grad():
            engine.model.lm_head.weight.zero_()  # half of it is there
        raise ConnectionResetError

    engine.load = breaking
    with pytest.raises(ResourceError, match=r"no sampling server answers at .*--resume auto"):
        sampler.sync()
    assert engine.version == "incomplete"
    with pytest.raises(ResourceError, match=r"no sampling server answers at .*--resume auto"):
        draw(sampler)

    engine.load = load
    again = sampler_of(pair, url)
    again.sync()
    assert worst_difference(pair, draw(again)) < 1e-5


def test_a_process_that_does_not_push_takes_the_version_of_its_server(folder, engine, url):
    pushing = sampler_of(pair_of(folder), url)
    config = RolloutConfig(url=url, max_new_tokens=6)
    other = VLLMSampler(pair_of(folder), config, seed=0, pushes=False)
    pushing.sync()
    other.sync()
    draw(other)
    assert other.version == pushing.version != ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_ids": ["x"]}, "malformed answer at choices.0.token_ids.0"),
        ({"token_ids": [-1]}, "malformed answer at choices.0.token_ids.0"),
        ({"token_ids": []}, "malformed answer at choices.0.token_ids"),
        ({"token_ids": [23]}, "the 4 completions .* of at most 6 tokens below 23"),
        ({"token_ids": [5] * 7}, "did not give the 4 completions"),
        ({"index": 9}, "did not give the 4 completions"),
        ({"token_ids": [5, 5, 5, 5, 5]}, "its log-probs are not those of its tokens"),
        ({"logprobs": None}, "malformed answer at choices.0.logprobs"),
        ({"weight_versions": None}, "malformed answer at choices.0.weight_versions"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_is_no_data(folder, engine, url, change, words):
    sampler, true = sampler_of(pair_of(folder), url), engine.choices
    engine.choices = lambda asked: [{**row, **change} for row in true(asked)]
    sampler.sync()
    with pytest.raises(ResourceError, match=words):
        draw(sampler)


def test_log_probs_that_are_not_finite_are_a_numerical_stop(folder, engine, url):
    """vLLM writes -9999 in their place."""
    sampler = sampler_of(pair_of(folder), url)
    engine.sample = lambda prompt, n, **_: [{"ids": [5], "logps": [-9999.0], "ended": False}] * n
    sampler.sync()
    with pytest.raises(NumericsError, match="not finite"):
        draw(sampler)


def test_a_server_that_hangs_breaks_or_is_gone(folder, engine):
    with serving(engine) as url:
        sampler = sampler_of(pair_of(folder), url)
        sampler.sync()
        sampler.fleet.clients[0].timeout = 0.2
        true = engine.sample
        engine.sample = lambda *_, **__: time.sleep(0.3) or []
        with pytest.raises(
            ResourceError,
            match=r"did not answer in 0\.2 s; start it again, then go on with --resume auto",
        ):
            draw(sampler)
        sampler.fleet.clients[0].timeout = 5
        engine.sample = lambda *_, **__: 1 / 0
        sampler.sync()
        with pytest.raises(
            ResourceError, match="answered /inference/v1/generate with 500: ZeroDivisionError"
        ):
            draw(sampler)
        engine.sample = true
    with pytest.raises(
        ResourceError, match=r"no sampling server answers at http://127\.0.*Connection"
    ):
        draw(sampler)


def test_a_server_that_is_still_starting_is_waited_for(folder, engine, caplog, monkeypatch):
    monkeypatch.setattr("alignkit.rollout.client.WARN_EVERY", 0.1)
    with serving(engine) as url:
        port = int(url.rpartition(":")[2])
    with pytest.raises(
        ResourceError,
        match=r"within rollout.start_timeout \(0.3 s\); start one with `VLLM_SERVER_DEV_MODE=1 vllm serve",
    ):
        Client(url, timeout=1).wait(0.3)
    assert "of 0.3 s" in caplog.text
    found = []
    thread = threading.Thread(target=lambda: found.append(Client(url, timeout=1).wait(5)))
    thread.start()
    time.sleep(0.2)
    with serving(engine, port):
        thread.join()
    assert found[0]["model"] == str(folder)


def test_another_model_is_refused(folder, engine, url, tmp_path):
    pair = pair_of(folder)
    about = dict(engine.about)
    wide = AutoConfig.from_pretrained(folder)
    wide.hidden_size = 32
    wide.save_pretrained(tmp_path)
    for change, words in [
        ({"model": str(tmp_path)}, r"another architecture \(hidden_size 32 for 16\)"),
        ({"dtype": "torch.int8"}, "in int8; allowed: float32"),
        ({"logprobs_mode": "raw_logprobs"}, "gives raw_logprobs, not the log-probs of what it"),
    ]:
        engine.about = {**about, **change}
        with pytest.raises(ModelError, match=words):
            sampler_of(pair, url)
    engine.about = about
    engine.load = lambda folder: (_ for _ in ()).throw(KeyError("no such layer"))
    sampler = sampler_of(pair, url)
    with pytest.raises(ModelError, match=r"refused the policy's weights: .* 'no such layer'"):
        sampler.sync()
    assert engine.calls[-1] == "/resume"
    with pytest.raises(ResourceError, match="stale weights"):
        draw(sampler)


def test_the_context_of_the_server_is_a_limit(folder, engine, url):
    sampler = sampler_of(pair_of(folder), url)
    sampler.about[0]["max_model_len"] = 9
    with pytest.raises(
        ConfigError, match="a prompt leaves room for 5 of 6 tokens in the server's 9"
    ):
        draw(sampler)


def test_the_token_is_sent(folder, engine, monkeypatch):
    with serving(engine, token="s3cret") as url:
        for value in ("", "wrong"):
            monkeypatch.setenv(TOKEN_ENV, value)
            with pytest.raises(ResourceError, match="with 401: Unauthorized"):
                Client(url, timeout=1).wait(5)
        monkeypatch.setenv(TOKEN_ENV, "s3cret")
        assert Client(url, timeout=1).about()["model"] == str(folder)
    monkeypatch.delenv(TOKEN_ENV)
    with pytest.raises(ConfigError, match=f"is not this machine; set {TOKEN_ENV}"):
        Client("https://gpu.example:8001", timeout=1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"url": "http://10.0.0.3:8001"}, "http would send weights to 10.0.0.3 in the clear"),
        ({"url": "http://example.com"}, "in the clear"),
        ({"url": "ftp://127.0.0.1"}, "write http://127.0.0.1:PORT"),
        ({"url": "http://127.0.0.1:8001/v1"}, "write http://127.0.0.1:PORT"),
        ({"url": "http://me:pw@127.0.0.1"}, "write http://127.0.0.1:PORT"),
        ({"url": "http://127.0.0.1:port"}, "port"),
        ({"url": ["http://127.0.0.1:1", "http://10.0.0.3:1"]}, "in the clear"),
        ({"url": ["http://127.0.0.1:1"] * 2}, "a server is named twice"),
        ({"url": []}, "at least 1 item"),
        ({"colocate": True, "url": "https://gpu.example"}, "colocate starts servers on this"),
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
    assert RolloutConfig(colocate=True).engine == "vllm"
    for url in (
        "http://127.0.0.1:8001",
        "http://localhost:1",
        "http://[::1]:8001",
        "https://gpu.example",
    ):
        assert RolloutConfig(url=url).engine == "vllm"
