"""Weights by vLLM's weight transfer. NCCL and CUDA's shared memory exist on GPUs alone; here gloo and
a mapped file stand in for them, and a small server for vLLM (transfer_server.py).

A real vLLM with the same stand-ins: test_real_transfer.py. The true ones: tests/gpu.
"""

import ast
import logging
import subprocess
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transfer_worker
from safetensors.torch import load_file
from small_server import TransformersEngine, serving
from test_vllm_sampler import draw, moved, pair_of, sampler_of, worst_difference
from transfer_server import INIT, UPDATE, TransferEngine, without_gpus
from two_processes import on_two_processes
from vllm_process import PYTHON, needs_vllm
from world import save_model

from alignkit.config.model import AdapterConfig
from alignkit.config.rollout import RolloutConfig
from alignkit.errors import ConfigError, ModelError, ResourceError
from alignkit.policies.weight_stream import WeightStream
from alignkit.rollout import colocated, transfer, transfer_ways
from alignkit.rollout.engines import make_sampler

WAYS = ["nccl", "ipc"]
both = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, tmp_path):
    without_gpus(monkeypatch, tmp_path)
    monkeypatch.setattr(transfer, "CHUNK", 2000)  # bytes: several requests for these small models


@both
def test_the_servers_draw_from_what_was_sent(folder, way, caplog):
    engines = [TransferEngine(folder, way), TransferEngine(folder, way)]
    pair = pair_of(folder, adapter=AdapterConfig(r=4, alpha=8))
    with serving(engines[0]) as first, serving(engines[1]) as second:
        caplog.set_level(logging.INFO, "alignkit")
        sampler = sampler_of(pair, [first, second])
        assert f"the servers get the weights by {way.upper()}" in caplog.text
        versions = []
        for _ in range(2):
            moved(pair, by=0.1)
            sampler.sync()
            drawn = draw(sampler)
            assert worst_difference(pair, drawn) < 1e-5
            versions.append(sampler.version)

        sampler.sync()
        versions.append(sampler.version)
    assert [version.partition(":")[0] for version in versions] == ["1", "2", "3"]
    digests = [version.partition(":")[2] for version in versions]
    assert digests[0] != digests[1] == digests[2]

    with pair.model() as model:
        sent = dict(WeightStream(model, torch.float32))
    for engine in engines:
        assert engine.version == versions[-1]
        state = engine.model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in sent.items())
        # one group, and never more at once than a chunk or the largest tensor
        assert engine.calls.count("/init_weight_transfer_engine") == 1
        updates = [
            asked["update_info"] for path, asked in engine.asked if path == "/update_weights"
        ]
        assert len(updates) > 3
        names = [name for info in updates for name in info["names"]]
        assert names == 3 * list(sent)


@both
def test_new_weights_are_in_force_only_when_all_of_them_are_there(folder, way):
    engine = TransferEngine(folder, way)
    with serving(engine) as url:
        sampler = sampler_of(pair_of(folder), url)
        sampler.sync()
        engine.calls.clear()
        sampler.sync()
    calls = [call for call in engine.calls if call not in ("/weight_info", "/update_weights")]
    rename = "/update_weight_version"
    begun = ["/pause", rename, "/start_weight_update"]
    assert calls == [*begun, "/finish_weight_update", "/reset_prefix_cache", rename, "/resume"]


@both
def test_a_transfer_that_breaks_in_the_middle_is_no_version_and_is_made_again(folder, way):
    pair, engine = pair_of(folder), TransferEngine(folder, way)
    moved(pair)
    update, count = engine.update, 0

    def breaking(update_info):
        nonlocal count
        count += 1
        if count == 3:
            raise ConnectionResetError
        update(update_info)

    with serving(engine) as url:
        sampler = sampler_of(pair, url)
        engine.update = breaking
        with pytest.raises(ResourceError, match=r"no sampling server answers at .*--resume auto"):
            sampler.sync()
        assert (engine.version, sampler.version) == ("incomplete", "")
        assert engine.active  # and parts of the weights are there

        sampler.sync()
        assert worst_difference(pair, draw(sampler)) < 1e-5
        assert sampler.version.startswith("2:")


@both
def test_a_server_that_dies_in_a_transfer_is_left_out(folder, way, caplog):
    engines = [TransferEngine(folder, way), TransferEngine(folder, way)]
    pair = pair_of(folder)
    moved(pair)

    def dying(update_info):
        raise ConnectionResetError

    with serving(engines[0]) as first, serving(engines[1]) as second:
        sampler = sampler_of(pair, [first, second])
        engines[0].update = dying
        sampler.sync()
        assert worst_difference(pair, draw(sampler)) < 1e-5
        assert "1 other servers take over its work" in caplog.text
        assert (engines[0].version, engines[0].prompts) == ("incomplete", 0)

        del engines[0].update
        sampler.sync()  # it joins again, and gets all weights
        draw(sampler, n=2)
    assert engines[0].version == engines[1].version == sampler.version
    assert engines[0].calls.count("/init_weight_transfer_engine") == 2


@both
def test_a_server_that_was_started_again_joins_again(folder, way):
    pair, engine = pair_of(folder), TransferEngine(folder, way)
    with serving(engine) as url:
        sampler = sampler_of(pair, url)
        sampler.sync()
        port = int(url.rpartition(":")[2])
    fresh = TransferEngine(folder, way)
    moved(pair)
    with serving(fresh, port):
        sampler.sync()
        assert worst_difference(pair, draw(sampler)) < 1e-5


@both
def test_weights_that_the_server_refuses_end_the_run(folder, way):
    engine = TransferEngine(folder, way)

    def refusing(update_info):
        engine.group = None  # gloo, unlike NCCL, cannot leave a group whose other side waits
        raise KeyError("no such layer")

    with serving(engine) as url:
        sampler = sampler_of(pair_of(folder), url)
        engine.update = refusing
        with pytest.raises(ModelError, match=r"refused the policy's weights: .* 'no such layer'"):
            sampler.sync()
    assert engine.version == "incomplete"
    assert engine.calls[-1] == "/resume"


def test_a_group_that_cannot_be_made(folder):
    engine = TransferEngine(folder, "nccl")

    def refusing(init_info):
        raise RuntimeError("NCCL error: invalid usage")

    engine.join = refusing
    with serving(engine) as url:
        sampler = sampler_of(pair_of(folder), url)
        words = (
            r"no NCCL group with the server at .* \(.*NCCL error: invalid usage\); its GPUs have"
        )
        with pytest.raises(ResourceError, match=words):
            sampler.sync()


@both
def test_a_release_without_the_endpoints(folder, way):
    engine = TransferEngine(folder, way)

    def absent(**_):
        raise FileNotFoundError

    with serving(engine) as url:
        sampler = sampler_of(pair_of(folder), url)
        for step in ("start", "join"):
            setattr(engine, step, absent)
            with pytest.raises(
                ModelError, match=r"has no /(start|init)_weight_.* has it from 0\.32"
            ):
                sampler.sync()


def test_which_way_is_taken(folder, monkeypatch):
    """What all servers were started for; a way that is asked for has to be there."""
    pair = pair_of(folder)
    engines = {way: TransferEngine(folder, way) for way in ("nccl", "ipc", None)}
    older = TransformersEngine(folder)  # says nothing of a transfer
    with (
        serving(engines["nccl"]) as nccl,
        serving(engines["ipc"]) as ipc,
        serving(engines[None]) as plain,
        serving(older) as old,
    ):

        def way(urls, **fields):
            made = sampler_of(pair, urls, **fields).transfer
            return made and type(made.way).__name__

        assert way(nccl) == way(nccl, transfer="nccl") == "NCCL"
        assert way(ipc) == way([ipc], transfer="ipc") == "IPC"
        for urls in (plain, old, [nccl, ipc], [nccl, plain]):
            assert way(urls) is None
        assert way(nccl, transfer="file") is way(nccl, ahead=1) is None
        assert way(nccl, weights_dir="somewhere") is None
        for url, asked in ((plain, "nccl"), (old, "ipc"), (nccl, "ipc"), ([ipc, plain], "ipc")):
            words = f'was not started for {asked}; start it with .*"backend": "{asked}"'
            with pytest.raises(ModelError, match=words):
                way(url, transfer=asked)

        answer = engines["ipc"].answer
        engines["ipc"].answer = lambda path, asked: {**answer(path, asked), "vllm_env": {}}
        with pytest.raises(ModelError, match="start it with VLLM_ALLOW_INSECURE_SERIALIZATION=1"):
            way(ipc)

        monkeypatch.setattr(transfer_ways, "on_gpu", lambda device: False)
        assert way(nccl) is None
        with pytest.raises(
            ConfigError, match=r"takes the weights from the policy's GPU, .* on the cpu"
        ):
            way(nccl, transfer="nccl")


def test_a_gpu_without_room_for_the_buffer(folder, monkeypatch):
    def full(size, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256 MiB")

    monkeypatch.setattr("alignkit.rollout.transfer_ipc.shared_buffer", full)
    with serving(TransferEngine(folder, "ipc")) as url:
        sampler = sampler_of(pair_of(folder), url)
        with pytest.raises(ResourceError, match=r"could be shared with the servers \(CUDA out of"):
            sampler.sync()


def test_a_policy_on_no_gpu_is_refused_before_a_server_is_waited_for(folder, monkeypatch):
    monkeypatch.setattr(transfer_ways, "on_gpu", lambda device: False)
    config = RolloutConfig(url="http://127.0.0.1:1", transfer="nccl", start_timeout=60)
    with pytest.raises(ConfigError, match=r"takes the weights from the policy's GPU"):
        make_sampler(config, pair_of(folder), seed=0)


def test_a_torch_without_nccl(folder, monkeypatch):
    monkeypatch.setattr("alignkit.rollout.transfer_nccl.nccl_is_there", lambda: False)
    words = "the installed torch has no NCCL; install one that"
    with serving(TransferEngine(folder, "nccl")) as url, pytest.raises(ConfigError, match=words):
        sampler_of(pair_of(folder), url)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"transfer": "nccl"}, "there is no url; leave it out"),
        ({"transfer": "file"}, "there is no url; leave it out"),
        ({"transfer": "rdma", "url": "http://127.0.0.1"}, "transfer"),
        ({"transfer": "nccl", "url": "http://127.0.0.1", "ahead": 1}, "leave out one of ahead and"),
        ({"transfer": "ipc", "url": "http://127.0.0.1", "weights_dir": "x"}, "writes no file"),
        ({"transfer": "nccl", "colocate": True}, "use transfer: ipc"),
        ({"transfer": "ipc", "url": "https://gpu.example"}, "the trainer's own GPUs"),
    ],
)
def test_the_section_refuses(fields, words):
    with pytest.raises(ValueError, match=words):
        RolloutConfig(**fields)


@pytest.mark.parametrize(("sleeps", "transfer"), [(True, None), (True, "file"), (False, None)])
def test_servers_on_the_trainers_gpus_are_started_for_ipc(folder, monkeypatch, sleeps, transfer):
    """`sleeps` is what they do on a GPU; nothing is started here."""
    started = []

    class Program:
        def __init__(self, command, env, **_):
            started.append((command, env))

        def wait(self, seconds):
            raise subprocess.TimeoutExpired("vllm", seconds)

    monkeypatch.setattr(colocated, "_running", {})
    monkeypatch.setattr(colocated.subprocess, "Popen", Program)
    monkeypatch.setattr(colocated.atexit, "register", lambda *_: None)
    config = RolloutConfig(colocate=True, program=sys.executable, transfer=transfer)
    colocated.start_servers(config, pair_of(folder), sleeps=sleeps)
    ((command, environment),) = started
    by_ipc = sleeps and transfer is None
    assert (command[-2:] == ["--weight-transfer-config", '{"backend": "ipc"}']) == by_ipc
    assert ("VLLM_ALLOW_INSECURE_SERIALIZATION" in environment) == by_ipc


def test_chunks_hold_no_more_than_one_may_and_are_aligned(monkeypatch):
    kinds = [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, torch.int64]
    sizes = [3, 1, 5, 500, 2]
    stream = [(str(i), torch.zeros(n, dtype=kind)) for i, (n, kind) in enumerate(zip(sizes, kinds))]
    chunks = [[name for name, _ in chunk] for chunk in transfer.chunks(stream)]
    assert chunks == [["0", "1", "2"], ["3"], ["4"]]
    odd = [stream[0], stream[2]]  # six bytes, after which no float32 may begin
    assert [len(chunk) for chunk in transfer.chunks(odd)] == [1, 1]


@both
def test_what_make_gpu_runs_with_a_real_vllm_runs_with_this_one(monkeypatch, way):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "gpu"))
    transfers = import_module("transfers")

    @contextmanager
    def served(way, folder, vllm):
        with serving(TransferEngine(folder, way)) as url:
            yield url

    monkeypatch.setattr(transfers, "served", served)
    assert "log-probs and the trainer's agree" in transfers.sent(way, "tiny", "vllm")


@pytest.mark.long
@pytest.mark.parametrize("way", [*WAYS, "file"])
def test_two_processes_send_what_they_have_in_shards(folder, way, tmp_path):
    """An adapter is folded in; the result is that of one process, bit for bit."""
    out = tmp_path / "arrived.safetensors"
    with on_two_processes(transfer_worker.__file__, folder, out, way):
        pass
    arrived = load_file(out)
    with transfer_worker.policy(folder).model() as model:
        sent = dict(WeightStream(model, torch.float32))
    assert all(torch.equal(arrived[name], tensor) for name, tensor in sent.items())
    assert not torch.equal(
        arrived["model.layers.0.self_attn.q_proj.weight"],
        TransferEngine(folder, way).model.model.layers[0].self_attn.q_proj.weight,
    )


@needs_vllm
def test_the_fields_are_those_of_vllms_dataclasses():
    """What the stand-in takes is what the vLLM in its environment takes."""
    (package,) = (PYTHON.parents[1] / "lib").glob("python3*/site-packages/vllm")
    place = package / "distributed" / "weight_transfer"
    for file, name, ours in [
        ("nccl_common", "NCCLWeightTransferInitInfo", INIT["nccl"]),
        ("nccl_engine", "NCCLWeightTransferUpdateInfo", UPDATE["nccl"]),
        ("ipc_engine", "IPCWeightTransferInitInfo", INIT["ipc"]),
        ("ipc_engine", "IPCWeightTransferUpdateInfo", UPDATE["ipc"]),
    ]:
        tree = ast.parse((place / f"{file}.py").read_text())
        (found,) = [node for node in tree.body if getattr(node, "name", "") == name]
        fields = [line.target.id for line in found.body if isinstance(line, ast.AnnAssign)]
        assert set(fields) == ours, name
